"""The C++ operators: one shared library, loaded with ctypes, for every instruction set and version of torch.

The library (built by CMakeLists.txt; see docs/design/cpu-operators.md) links neither torch nor Python nor an OpenMP
runtime. It holds each operator once per instruction set; the best one for the CPU is used, or the one named
by the environment variable ``BERT_FAST_CPU_ISA``. Threads come from the pool that torch itself uses, and
``torch.set_num_threads`` holds. Beside this file lies one module per operator, with the signatures of
bert_fast/reference.py; float64 is the reference's.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch

from bert_fast.devices import bfloat16_pairs_pay

# BERT_FAST_CPU_LIBRARY names another build of the library, for one with sanitizers.
LIBRARY = Path(os.environ.get("BERT_FAST_CPU_LIBRARY") or Path(__file__).with_name("libbert_fast_cpu.so"))
INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16")  # in the order of bert_fast_instruction_sets()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in kernels/cpu/vector.h

_CTYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def why_unavailable() -> str | None:
    """Why the C++ operators cannot run here, in words, or None where they can."""
    try:
        instruction_set()
    except (OSError, ValueError) as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        raise OSError(f"the C++ operators are not built ({LIBRARY.name} is not in {LIBRARY.parent})")
    library = ctypes.CDLL(str(LIBRARY))
    library.bert_fast_instruction_sets.restype = ctypes.c_int
    library.bert_fast_set_team.argtypes = [ctypes.c_void_p]
    team = _torch_team()
    if team is not None:
        library.bert_fast_set_team(ctypes.cast(team, ctypes.c_void_p))
    return library


def _torch_team():
    """GOMP_parallel as torch's own library reaches it, or None where torch was built without OpenMP."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            # Already loaded: this only makes a handle, and looking a name up in it searches what it depends on.
            return getattr(ctypes.CDLL(str(folder / name)), "GOMP_parallel", None)
    return None


@functools.cache
def has_threads() -> bool:
    """Whether the operators run on torch's threads; where torch brings no OpenMP runtime, they run on one."""
    return _torch_team() is not None


def supported_instruction_sets() -> list[str]:
    """The instruction sets of this CPU that the library has code for, from the plainest to the best."""
    found = _library().bert_fast_instruction_sets()
    return [name for i, name in enumerate(INSTRUCTION_SETS) if found >> i & 1]


@functools.cache
def instruction_set() -> str:
    """The instruction set whose code runs: the best this CPU has, or the one in ``BERT_FAST_CPU_ISA``.

    avx512_bf16 is not the best where the processor has vdpbf16ps at a lower rate than float32's multiply-add.
    Raises ValueError where that names none, or one that the CPU or the build lacks; OSError without a library.
    """
    supported = supported_instruction_sets()
    forced = os.environ.get("BERT_FAST_CPU_ISA")
    if not forced:
        worthwhile = [name for name in supported if name != "avx512_bf16" or bfloat16_pairs_pay()]
        return worthwhile[-1]
    if forced not in INSTRUCTION_SETS:
        raise ValueError(f"BERT_FAST_CPU_ISA is {forced!r}; the instruction sets are {', '.join(INSTRUCTION_SETS)}")
    if forced not in supported:
        raise ValueError(f"BERT_FAST_CPU_ISA asks for {forced}, but this CPU has only {', '.join(supported)}")
    return forced


def function(name: str, parameters: str):
    """The library's function ``name`` for the instruction set in use.

    ``parameters`` has a letter per parameter: p a tensor or None (its data's address is passed), l int64,
    i int32, f float32. The caller keeps tensors contiguous, of the right dtype, and alive.
    """
    compiled = getattr(_library(), f"{name}_{instruction_set()}")
    compiled.argtypes = [_CTYPES[letter] for letter in parameters]
    compiled.restype = ctypes.c_int
    pointers = [i for i, letter in enumerate(parameters) if letter == "p"]

    def call(*arguments) -> None:
        values = list(arguments)
        for i in pointers:
            if values[i] is not None:
                values[i] = values[i].data_ptr()
        if compiled(*values) != 0:
            raise MemoryError(f"bert_fast: the C++ operator {name} could not allocate its working memory")

    call.__name__ = name
    return call


def parameter(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``tensor`` in a dtype that operators on ``dtype`` take for parameters: float32, or ``dtype`` itself."""
    if tensor is None or tensor.dtype in (torch.float32, dtype):
        return tensor
    return tensor.float()
