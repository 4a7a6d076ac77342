"""``python -m bert_fast.env``: versions, devices, backends and what is missing, to read or to put in a report."""

import importlib
import importlib.metadata
import os
import platform

import torch

from bert_fast import __version__, compilers, dispatch

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "flash-attn", "apex")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict:
    """What runs here: {"versions", "warnings", "machine", "devices", "backends", "operators"}, of plain strings and
    numbers."""
    devices, capabilities = [], []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        capabilities.append(10 * major + minor)
        devices.append(f"{torch.cuda.get_device_name(i)} (compute capability {major}.{minor})")
    return {
        "versions": {"bert_fast": __version__, "python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES}
        | {"ptxas": compilers.assemblers()},
        "warnings": compilers.warnings_for(capabilities),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "C++ operators": _cpu_operators(),
        },
        "devices": devices,
        "backends": {name: dispatch.why_unavailable(name) or "available" for name in dispatch.BACKENDS},
        "operators": dispatch.backends(),
    }


def _cpu_operators() -> str:
    reason = dispatch.why_unavailable("cpu")
    if reason is not None:
        return f"none: {reason}"
    cpu = importlib.import_module("bert_fast.kernels.cpu")
    return f"{cpu.instruction_set()}, {'on the threads of torch' if cpu.has_threads() else 'on one thread'}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    facts = environment()
    for title in ("versions", "machine", "backends"):
        print(title)
        for name, value in facts[title].items():
            print(f"  {name:26} {value}")
    for warning in facts["warnings"]:
        print(f"warning: {warning}")
    print("devices")
    for device in facts["devices"] or ["no GPU is visible to torch"]:
        print(f"  {device}")
    print("operators (what runs on tensors of each device)")
    for operator, chosen in facts["operators"].items():
        print(f"  {operator:26} {', '.join(f'{device}: {backend}' for device, backend in chosen.items())}")


if __name__ == "__main__":
    main()
