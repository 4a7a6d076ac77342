"""Prints the compiler's options for stand_in.c: where this Python's CUDA headers are, torch's and then Triton's."""

import importlib.util
import sys
from pathlib import Path

FOLDERS = {"nvidia": "cu13/include", "triton": "backends/nvidia/include"}  # Triton's are of another version of CUDA


def folders(package: str) -> list[Path]:
    """Where ``package`` is installed, its folder of headers."""
    spec = importlib.util.find_spec(package)
    found = [Path(root) / FOLDERS[package] for root in spec.submodule_search_locations] if spec else []
    return [folder for folder in found if (folder / "cuda_runtime_api.h").is_file()]


def main() -> int:
    found = {package: folders(package) for package in FOLDERS}
    if missing := [f"{package}/{FOLDERS[package]}" for package, where in found.items() if not where]:
        print(
            f"no CUDA headers in {' and '.join(missing)} among the packages of {sys.executable}: make gpu-rehearsal "
            "PYTHON=... needs the Python of an environment with torch's build for CUDA 13",
            file=sys.stderr,
        )
        return 1
    print(*(f"-I{folder}" for where in found.values() for folder in where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
