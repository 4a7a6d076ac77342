"""transformers' own model tests, from its source distribution of the installed version.

The wheel has no tests; the source distribution has `tests/test_modeling_common.py`. pip downloads it once into
`.cache/` of this checkout, and nothing of it is committed. Two mixin modules that it imports are left out of the
distribution; empty classes stand in for them (they add tests of exporting and of text generation, and the classes
tested here do not generate).
"""

import importlib
import pathlib
import subprocess
import sys
import tarfile
import types

import transformers

PACKAGE = "transformers_source_tests"
CACHE = pathlib.Path(__file__).resolve().parents[2] / ".cache" / "hf_suite"
_STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
# What pip says when it cannot reach the index at all, as opposed to an index that lacks the version.
_OFFLINE = ("NewConnectionError", "Failed to establish a new connection", "NameResolutionError", "ConnectTimeoutError")


class OfflineError(RuntimeError):
    """The package index could not be reached, and the source distribution is not in the cache."""


def unpacked_tests() -> pathlib.Path:
    """The folder `tests/` of the source distribution of the installed transformers, downloaded where it is missing.

    Raises OfflineError where the package index cannot be reached, RuntimeError with pip's words where pip fails
    otherwise.
    """
    name = f"transformers-{transformers.__version__}"
    archive = CACHE / f"{name}.tar.gz"
    if not archive.exists():
        _download(archive)
    folder = CACHE / name
    if not (folder / "tests" / "test_modeling_common.py").exists():
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.startswith(f"{name}/tests/")]
            tar.extractall(CACHE, members=members, filter="data")
    return folder / "tests"


def _download(archive: pathlib.Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    # pip asks a source distribution for its metadata even when it only downloads: without build isolation the
    # installed setuptools answers, and nothing else is fetched.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--dest", str(CACHE), f"transformers=={transformers.__version__}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not archive.exists():
        said = (done.stdout + done.stderr).strip()
        error = OfflineError if any(sign in said for sign in _OFFLINE) else RuntimeError
        raise error(f"pip could not download transformers' source distribution into {CACHE}:\n{said}")


def import_module(name: str) -> types.ModuleType:
    """Import one module of the distribution's tests by its name there, e.g. "test_modeling_common"."""
    if PACKAGE not in sys.modules:
        _make_package(PACKAGE, str(unpacked_tests()))
        for path, mixin in _STAND_INS.items():
            folder, module = path.split(".")
            _make_package(f"{PACKAGE}.{folder}")
            stand_in = types.ModuleType(f"{PACKAGE}.{folder}.{module}")
            setattr(stand_in, mixin, type(mixin, (), {}))
            sys.modules[stand_in.__name__] = stand_in
    return importlib.import_module(f"{PACKAGE}.{name}")


def _make_package(name: str, *path: str) -> None:
    package = types.ModuleType(name)
    package.__path__ = list(path)
    sys.modules[name] = package
