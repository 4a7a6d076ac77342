"""Which implementation runs: one table, one chooser.

An operator has up to five implementations, all with the signatures of bert_fast/reference.py (the optimisers' in
bert_fast/optim/reference.py). The tensor's device decides (cuda: triton; cpu: the C++ operators where they are built,
else the reference), float64 is the reference's; a backend asked for by name is used or its absence raised, never
replaced in silence.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import warnings

import torch

from bert_fast import choice

_TRITON = "bert_fast.kernels."
_CPU = "bert_fast.kernels.cpu."

# operator -> backend -> module that defines <operator>_fwd and <operator>_bwd (also embedding_layernorm_bwd_add and
# mlm_loss_bwd_, in place; optimizer: _norm, _rates, _adamw and _lamb)
TABLE = {
    "embedding_layernorm": {"triton": _TRITON + "embedding_layernorm", "cpu": _CPU + "embedding_layernorm"},
    "attention": {
        "triton": _TRITON + "attention",
        "cpu": _CPU + "attention",
        "flash_attn": "bert_fast.peers.flash_attn",
        "torch": "bert_fast.peers.torch_attention",
    },
    "residual_layernorm": {
        "triton": _TRITON + "residual_layernorm",
        "cpu": _CPU + "residual_layernorm",
        "apex": "bert_fast.peers.apex",
    },
    "bias_gelu": {"triton": _TRITON + "bias_gelu", "cpu": _CPU + "bias_gelu"},
    "feed_forward": {"triton": _TRITON + "experiments.feed_forward"},
    "mlm_loss": {"triton": _TRITON + "mlm_loss", "cpu": _CPU + "mlm_loss"},
    "optimizer": {"triton": _TRITON + "optimizer", "cpu": _CPU + "optimizer", "reference": "bert_fast.optim.reference"},
}
for _row in TABLE.values():
    _row.setdefault("reference", "bert_fast.reference")

# direction ("fwd", "bwd") -> compute capability -> from how many tokens on bias and GELU are in the epilogue of their
# product (kernels/experiments/feed_forward.py); where a direction names the GPU, the model's feed-forward is that one
# operator.
# Empty, as nothing has been measured: `make gpu` times both ways, and {"fwd": {90: 4096}} would be what to write after
# a win of the forward at 4096 tokens and more on compute capability 9.0.
FEED_FORWARD_EPILOGUE: dict[str, dict[int, int]] = {}

# compute capability -> from which max_seqlen on attention without dropout is PyTorch's flash kernel, in 16 bits. With
# dropout it is by name alone, as the masks are that library's.
ATTENTION_LIBRARY: dict[int, int] = {}

BACKENDS = ("triton", "cpu", "reference", "torch", "flash_attn", "apex")

_HOW_TO_GET = {
    "triton": "install it with `pip install 'triton>=3.6,<3.10'` (Linux only)",
    "cpu": "build it with a C++ compiler present: `pip install --no-build-isolation -e .`",
    "flash_attn": "install it with `pip install flash-attn --no-build-isolation` on a machine with CUDA's compiler",
    "apex": "build NVIDIA's apex from https://github.com/NVIDIA/apex (PyPI's `apex` is another project)",
}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and how to get it."""


def why_unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run in this environment, or None where it can."""
    if backend in ("reference", "torch"):
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests)"
        return None
    if backend == "cpu":
        if importlib.util.find_spec("bert_fast.kernels.cpu") is None:
            return "the C++ operators are not part of this installation"
        return importlib.import_module("bert_fast.kernels.cpu").why_unavailable()
    if backend in ("flash_attn", "apex"):
        return importlib.import_module(f"bert_fast.peers.{backend}").why_unavailable()
    raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")


_override: dict[str, str] = {}  # operator (or "*": every operator) -> backend
_functions: dict[tuple[str, str, str, bool], object] = {}  # arguments of implementation() -> what was chosen
_warned: set[str] = set()


def _validate(operator: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if operator != "*":
        if operator not in TABLE:
            raise ValueError(f"unknown operator {operator!r}; the operators are {', '.join(TABLE)}")
        if backend not in TABLE[operator]:
            raise ValueError(f"operator {operator} has no backend {backend!r}; it has {', '.join(TABLE[operator])}")
    reason = why_unavailable(backend)
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run here: {reason}; {_HOW_TO_GET[backend]}")


def set_backend(backend: str | None = None, **operators: str | None) -> None:
    """Ask for a backend by name, for every operator or for some: ``set_backend("reference", attention="triton")``.

    ``None`` gives the choice back to the tensor's device. Raises BackendUnavailable where a named backend
    cannot run here. The environment variable BERT_FAST_BACKEND does the same for every operator.
    """
    chosen = {"*": backend, **operators}
    for operator, name in chosen.items():
        if name is not None:
            _validate(operator, name)
    for operator, name in chosen.items():
        if name is None:
            _override.pop(operator, None)
        else:
            _override[operator] = name
    _functions.clear()


@contextlib.contextmanager
def use_backend(backend: str | None = None, **operators: str | None):
    """``set_backend`` for the length of a ``with`` block."""
    before = dict(_override)
    try:
        set_backend(backend, **operators)
        yield
    finally:
        _override.clear()
        _override.update(before)
        _functions.clear()


def _asked_for(operator: str) -> str | None:
    """The backend that was asked for by name, where it has ``operator``."""
    named = _override.get(operator) or _override.get("*")
    if named is None and os.environ.get("BERT_FAST_BACKEND"):
        named = os.environ["BERT_FAST_BACKEND"]
        _validate("*", named)
    return named if named in TABLE[operator] else None


def choose(operator: str, device_type: str, float64: bool = False) -> str:
    """The backend that runs ``operator`` on tensors of ``device_type``; ``float64``: whether these are."""
    if (named := _asked_for(operator)) is not None:
        return named
    preferred = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "reference")
    if preferred not in TABLE[operator] or (preferred == "triton" and float64):  # which the kernels do not have
        return "reference"
    reason = why_unavailable(preferred)
    if reason is None:
        return preferred
    if preferred not in _warned:
        _warned.add(preferred)
        warnings.warn(
            f"bert_fast: the {preferred} backend cannot run here ({reason}); the slower reference backend "
            f"serves. To get it: {_HOW_TO_GET[preferred]}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return "reference"


def implementation(operator: str, direction: str, device_type: str, float64: bool = False):
    """The function ``<operator>_<direction>`` of the chosen backend; direction is fwd or bwd (optimizer: see TABLE)."""
    key = (operator, direction, device_type, float64)
    if key not in _functions:
        backend = choose(operator, device_type, float64)
        if backend == "cpu" and device_type != "cpu":  # they would read the device's addresses as the host's
            raise BackendUnavailable(
                f"the C++ operators of backend 'cpu' cannot run {operator} on tensors of {device_type}: move the "
                "tensors or the model to the CPU, or ask for another backend"
            )
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            importlib.import_module("bert_fast.interpreter").correct()
        module = importlib.import_module(TABLE[operator][backend])
        function = getattr(module, f"{operator}_{direction}")
        if (operator, backend, device_type) == ("attention", "triton", "cuda"):
            function = _or_library(direction, function)
        _functions[key] = function
    return _functions[key]


def _or_library(direction: str, own):
    """``own``, or PyTorch's attention where ATTENTION_LIBRARY has the case; both directions see the same of it."""
    places = {"fwd": (0, 2, 6), "bwd": (1, 5, 9)}[direction]  # of qkv, max_seqlen and p among the arguments
    module = importlib.import_module(TABLE["attention"]["torch"])
    library = getattr(module, f"attention_{direction}")

    @functools.wraps(own)
    def attention(*given):
        if table := choice.of("attention.library", ATTENTION_LIBRARY):
            qkv, max_seqlen, p = (given[place] for place in places)
            fits = not p and module.why_unfit(False, qkv.dtype, qkv.shape[3], p) is None
            if fits and _from(table, qkv.device, max_seqlen):
                choice.served("attention.library")
                return library(*given)
        return own(*given)

    return attention


def _from(capabilities: dict[int, int], device: torch.device, count: int) -> bool:
    """Whether ``capabilities`` has the GPU, and asks for no more than ``count``."""
    major, minor = torch.cuda.get_device_capability(device)
    return count >= capabilities.get(10 * major + minor, math.inf)


def attention_by_library() -> bool:
    """Whether attention is PyTorch's, which has dropout as an operator of its own and is so only where asked for."""
    return _asked_for("attention") == "torch"


def why_no_library(device_type: str, dtype: torch.dtype, head_size: int, p: float) -> str | None:
    """Why attention by PyTorch does not have such a case, or None where it does."""
    module = importlib.import_module(TABLE["attention"]["torch"])
    return module.why_unfit(device_type == "cpu", dtype, head_size, p)


def library_attention(direction: str):
    """The function ``library_attention_<direction>`` of PyTorch's attention."""
    return getattr(importlib.import_module(TABLE["attention"]["torch"]), f"library_attention_{direction}")


def in_epilogue(direction: str, x: torch.Tensor) -> bool:
    """Whether FEED_FORWARD_EPILOGUE names the GPU that has ``x`` (T, ...) and asks for no more tokens."""
    capabilities = choice.of(f"feed_forward.{direction}_epilogue", FEED_FORWARD_EPILOGUE.get(direction, {}))
    if not capabilities or x.device.type != "cuda":
        return False
    return _from(capabilities, x.device, x.shape[0])


def backends() -> dict[str, dict[str, str]]:
    """What runs where: for each operator that the model uses its backend on CPU and CUDA tensors, as chosen now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        used = [operator for operator in TABLE if operator != "feed_forward" or FEED_FORWARD_EPILOGUE]
        return {operator: {device: choose(operator, device) for device in devices} for operator in used}
