"""What turns the Triton kernels into machine code here, and pairs of versions that are known to get it wrong.

Triton brings its own assemblers (ptxas), another one for new GPUs; TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH
put others in their place. What is known stands in :func:`known_faults` alone.
"""

import functools
import importlib.metadata
import re
import subprocess
from dataclasses import dataclass

CAPABILITIES = (80, 90, 100)
GLUON = ((3, 6), (3, 9))  # the oldest and the newest Triton with whose Gluon, which changes, kernels/ was compiled


@dataclass(frozen=True)
class Fault:
    """What a pair of versions does wrong. ``rule`` is the one of dev/compile_report.py that sees it in a
    kernel; it is ``tolerated`` there where it is in most kernels and nobody has seen a wrong result."""

    rule: str
    what: str
    tolerated: bool = False


def triton_version() -> str | None:
    """Of the installed Triton; None without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def since(*release: int) -> bool:
    """Whether the installed Triton is ``release`` (3, 9) or a later one."""
    return _numbers(triton_version() or "0") >= release


@functools.cache
def ptxas_version(capability: int) -> str | None:
    """Of the assembler that Triton takes for a compute capability (90 is 9.0), as "12.8.93"; None where none runs."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        command = [get_ptxas(capability).path, "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    return found and found[1]


def assemblers() -> str:
    """Their versions in words: "12.8.93 for 8.0 and 9.0, 13.1.80 for 10.0"."""
    serves: dict[str, list[str]] = {}
    for capability in CAPABILITIES:
        version = ptxas_version(capability)
        if version:
            serves.setdefault(version, []).append(f"{capability / 10}")
    return ", ".join(f"{version} for {' and '.join(served)}" for version, served in serves.items()) or "not installed"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def known_faults(triton: str, ptxas: str, capability: int) -> list[Fault]:
    """What is known to be wrong with a version of Triton and one of ptxas on a compute capability."""
    release, assembler, faults = _numbers(triton), _numbers(ptxas), []
    if capability // 10 == 9 and assembler < (13, 3):
        what = (
            "the assembler may reuse registers of a product before it has read them (triton-lang/triton#9433, #11781); "
            "13.3 is the first without. The compile report finds none in the engine's own kernels with triton 3.6.0 "
            "and 3.7.1"
        )
        faults.append(Fault("registers", what))
    if capability >= 90 and release < (3, 7, 1):
        what = "Triton puts no fence between copies and products in pipelined loops (triton-lang/triton#9610, #10537); "
        seen = "no wrong result is known" if assembler < (13,) else "ptxas 13 leaves no time between them: never use it"
        faults.append(Fault("fences", f"{what}{seen}. Triton 3.7.1 does", tolerated=assembler < (13,)))
    elif capability >= 100 and release < (3, 9):
        what = (
            "Triton puts no fence between copies and products of a pipelined loop that are issued ahead. The engine's "
            "own configurations have no such loop; Triton 3.9 puts one"
        )
        faults.append(Fault("fences", what))
    return faults


def tolerated(rule: str, faults: list[Fault]) -> Fault | None:
    """The one of ``faults`` that says of ``rule`` why a kernel that breaks it is not refused."""
    return next((fault for fault in faults if fault.rule == rule and fault.tolerated), None)


def refuse_untested_gluon() -> None:
    """Raises ImportError where Triton's Gluon is none that the kernels were compiled with."""
    version = triton_version() or "0"
    if not GLUON[0] <= _numbers(version)[:2] <= GLUON[1]:
        oldest, newest = (".".join(map(str, tested)) for tested in GLUON)
        raise ImportError(f"its kernels are tested with Triton {oldest} to {newest}, not {version}")


def warnings_for(capabilities) -> list[str]:
    """What is known of the versions installed here on these compute capabilities, a line each."""
    triton, lines = triton_version(), []
    for capability in sorted(set(capabilities)):
        ptxas = ptxas_version(capability)
        for fault in known_faults(triton, ptxas, capability) if triton and ptxas else ():
            lines.append(f"triton {triton} with ptxas {ptxas} on {capability / 10}: {fault.what}")
    return lines
