"""The package as a user gets it: what is importable, what is shipped, and what happens where something is missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, check=True, cwd=ROOT, **environment):
    """A child process in the repository's root (or ``cwd``), Triton's interpreter off."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BERT_FAST_BACKEND")} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_folder_kernels_is_never_a_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "bert_fast" / "kernels").is_symlink()
    code = "import transformers, transformers.utils as u; print(u.import_utils.is_kernels_available())"
    assert run(sys.executable, "-c", code).stdout.split()[-1] == "False"


def test_import_and_training_without_triton():
    code = """
import sys, warnings
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, bert_fast
assert "triton" not in sys.modules
assert bert_fast.backends()["bias_gelu"]["cpu"] in ("cpu", "reference")
bert_fast.set_backend("reference")
from bert_fast import ops
x = torch.randn(3, 5, requires_grad=True)
ops.bias_gelu(x).sum().backward()
print(x.grad.shape)
"""
    assert "torch.Size([3, 5])" in run(sys.executable, "-c", code).stdout


def test_environment_report():
    report = run(sys.executable, "-m", "bert_fast.env").stdout
    for word in ("torch", "triton", "transformers", "threads", "reference", "flash_attn", "attention"):
        assert word in report


def test_missing_prerequisites_are_named_with_their_package(tmp_path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$*" in *venv*|-) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = run("/bin/sh", "scripts/check_prerequisites.sh", str(python), check=False, PATH=str(tmp_path))
    assert done.returncode == 1
    for package in ("python3-venv", "python3-dev", "g++"):
        assert f"apt-get install {package}" in done.stderr
    assert run("/bin/sh", "scripts/check_prerequisites.sh", sys.executable).returncode == 0


def test_a_build_that_fails_leaves_no_library_of_other_sources(tmp_path):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "bert_fast"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    library = tmp_path / "kernels" / "cpu" / "libbert_fast_cpu.so"
    library.write_bytes(b"of yesterday")
    command = sys.executable, str(tmp_path / "setup.py"), "build_ext", "--inplace"
    done = run(*command, cwd=tmp_path, CXX="/bin/false")
    assert "the C++ operators were not built" in done.stderr
    assert not library.exists()


def test_pinned_versions_are_within_the_supported_ranges():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    pins = dict(
        line.split(";")[0].strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line.partition("#")[0].partition(";")[0]
    )  # fmt: skip
    ranges = [Requirement(r) for r in requires("bert_fast")]
    assert ranges
    for requirement in ranges:
        if requirement.name in pins and requirement.marker is None:
            assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} excludes the pinned version"


@pytest.mark.slow
def test_wheel_holds_kernels_and_installs_without_them_being_compiled(tmp_path):
    def wheel(folder, **environment):
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), ".",
            **environment)  # fmt: skip
        (path,) = folder.glob("*.whl")
        return path

    complete = wheel(tmp_path / "complete")
    names = zipfile.ZipFile(complete).namelist()
    assert "bert_fast/kernels/attention.py" in names
    assert "bert_fast/kernels/cpu/__init__.py" in names
    assert any(name.startswith("bert_fast/kernels/cpu/") and name.endswith((".so", ".dylib")) for name in names)
    assert not any(name.startswith("kernels/") for name in names)
    assert "-py3-none-" in complete.name

    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(complete))
    code = "import bert_fast; print(bert_fast.__file__); print(bert_fast.backends()['attention']['cpu'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(site / "bert_fast" / "__init__.py"), "cpu"]
