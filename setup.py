"""Packaging: the Python package, the folder kernels/ as bert_fast.kernels, and the C++ operators.

The C++ operators (kernels/cpu, built by CMakeLists.txt) are a plain shared library, loaded with ctypes: it
links neither Python nor torch, so one build serves every supported version of both, and nothing of torch is
needed to build it. Where there is no compiler the package installs all the same, without them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_PACKAGE = "bert_fast.kernels.cpu"
LIBRARY = "libbert_fast_cpu.so"


def _tool(name: str) -> str | None:
    """The path of a build tool: its Python package first (its scripts folder may not be on PATH), then PATH."""
    beside_python = Path(sys.executable).parent / name
    return str(beside_python) if beside_python.exists() else shutil.which(name)


class BuildCpuOperators(build_ext):
    """Configures, builds and installs CMakeLists.txt's library into the package. A failure is a message."""

    def run(self) -> None:
        # What an earlier build left is of other sources: where this one fails it must not serve in its place.
        (self._folder() / LIBRARY).unlink(missing_ok=True)
        try:
            self._build()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            # The one place that may swallow a failed build: the package works without it, more slowly.
            print(f"\nbert_fast: the C++ operators were not built: {error}", file=sys.stderr)
            print(
                "bert_fast: the package works without them, on its slower reference backend. To get them, install a "
                "C++ compiler (Debian, Ubuntu: apt-get install g++) and install bert_fast again.\n",
                file=sys.stderr,
            )

    def _build(self) -> None:
        cmake = _tool("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; `pip install cmake ninja` brings it")
        ninja = _tool("ninja")
        build = ROOT / "build" / "cmake"
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *generator]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(self._folder().resolve())], check=True)

    def _folder(self) -> Path:
        """Where the library goes."""
        return ROOT / "kernels" / "cpu" if self.inplace else Path(self.build_lib, *CPU_PACKAGE.split("."))


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3: it holds a shared library that does not link Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


# bert_fast/kernels is a symlink to kernels/, which has no __init__.py (a top-level regular package of that name
# would shadow the package `kernels` that transformers looks for), so its packages are named by hand.
KERNEL_PACKAGES = ["bert_fast.kernels", "bert_fast.kernels.experiments", CPU_PACKAGE]
packages = [name for name in find_packages(include=["bert_fast", "bert_fast.*"]) if name not in KERNEL_PACKAGES]

setup(
    packages=[*packages, *KERNEL_PACKAGES],
    package_dir={name: name.removeprefix("bert_fast.").replace(".", "/") for name in KERNEL_PACKAGES},
    package_data={"bert_fast": ["data/*.json", "py.typed"]},
    ext_modules=[Extension(CPU_PACKAGE + ".library", sources=[])],
    cmdclass={"build_ext": BuildCpuOperators, "bdist_wheel": PlatformWheel},
)
