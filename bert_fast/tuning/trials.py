"""A candidate tried on the device: compiled, held against float64 and against the rules of machine code, and timed.

This runs in a process of its own (bert_fast/supervised.py), which asks for :func:`answer` and :func:`compiled`: a
kernel that hangs or loses the device takes that process with it, and not the run.

    right    forward and gradients of SETS batches of the lengths at hand, each twice for equal bits: no element is
             further from the truth than FACTOR times the worst one of the default is, and FLOOR units in the last
             place of the greatest. By a library with dropout its mask is its own; what can be held against float64 is
             the case without, and that the backward had the forward's mask: out^2 summed is then v times its gradient.
    seconds  forward, backward and the bias's sum, recorded as a CUDA graph and replayed over the SETS batches in turn
"""

import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from bert_fast import choice, compilers, dispatch, ops
from bert_fast.dropout_mask import row_keys
from bert_fast.supervised import raise_if_device_lost
from bert_fast.tuning import sass, store
from bert_fast.tuning.candidates import Sizes, dtype_of
from bert_fast.tuning.rule import DEFAULT_WRONG, Choices

Tensor = torch.Tensor
SETS = 3  # batches that take turns: together more than a cache holds
REPEAT = 20
FACTOR, FLOOR = 1.5, 2.0
ABSOLUTE = 16.0  # units in the last place of the greatest element that the default itself may be off
MASKS = 0.02  # of out^2: rounding leaves less than a thousandth, another mask leaves the dropout rate
EPS = 1e-12
# what a kernel says when it has a call (choice.served); a launch configuration serves where its kernel does
TABLES = ("attention.asynchronous", "attention.one_pass", "attention.library", "feed_forward.fwd_epilogue",
          "feed_forward.bwd_epilogue")  # fmt: skip


class Wrong(RuntimeError):
    """A candidate's results, or its machine code, are not right."""


class DefaultWrong(RuntimeError):
    """The default's results are not right."""


@dataclass(frozen=True)
class Batch:
    """``function`` of ``inputs`` (name -> what gets a gradient) gives a tensor, whose gradient is ``grad_out``."""

    function: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    grad_out: Tensor

    def run(self, of: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """The result and the gradients, of the inputs as ``of`` has them."""
        leaves = {name: of(x).detach().requires_grad_() for name, x in self.inputs.items()}
        out = self.function(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), of(self.grad_out).to(out.dtype))
        return {"out": out.detach()} | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}


class Operands:
    """Random operands of a micro-batch of ``sizes`` on ``device``, the same for the same ``seed``."""

    def __init__(self, sizes: Sizes, device: str, seed: int):
        self.sizes, self.device = sizes, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.parameters = dtype_of(sizes.dtype), dtype_of(sizes.parameters)
        self.cu_seqlens = torch.tensor([0, *sizes.lengths]).cumsum(0).int().to(device)
        self.row_key, self.rng_key = row_keys(self.cu_seqlens, sizes.tokens), self.integers(2**62, 1)

    def random(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """What a matrix product gave, or in another dtype."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.mul_(scale).add_(mean).to(dtype or self.dtype)

    def parameter(self, *shape: int, mean: float = 0.0) -> Tensor:
        return self.random(*shape, dtype=self.parameters, scale=0.02, mean=mean)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def keys(self, p: float) -> dict:
        return {"p": p, "row_key": self.row_key, "rng_key": self.rng_key}


def attention(o: Operands) -> Batch:
    s = o.sizes
    heads = (3, s.heads, s.head_size)

    def function(qkv: Tensor, bias: Tensor) -> Tensor:
        return ops.attention(qkv, o.cu_seqlens, s.longest, bias=bias, **o.keys(s.dropout[0]))

    return Batch(
        function, {"qkv": o.random(s.tokens, *heads), "bias": o.parameter(*heads)}, o.random(s.tokens, s.hidden)
    )


def residual_layernorm(o: Operands) -> Batch:
    s = o.sizes
    inputs = {"x": o.random(s.tokens, s.hidden), "residual": o.random(s.tokens, s.hidden),
              "weight": o.parameter(s.hidden, mean=1.0), "ln_bias": o.parameter(s.hidden),
              "bias": o.parameter(s.hidden)}  # fmt: skip
    function = functools.partial(ops.residual_layernorm, eps=EPS, **o.keys(s.dropout[1]))
    return Batch(function, inputs, o.random(s.tokens, s.hidden))


def embedding_layernorm(o: Operands) -> Batch:
    """Ids as they come, [CLS], [SEP] and [MASK] often, as in every batch."""
    s = o.sizes
    common = torch.tensor([101, 102, 103], device=o.device).remainder(s.vocabulary)
    often = torch.rand(s.tokens, generator=o.generator, device=o.device) < 0.15
    ids = torch.where(often, common[o.integers(3, s.tokens)], o.integers(s.vocabulary, s.tokens))
    starts = o.cu_seqlens[:-1].long().repeat_interleave(o.cu_seqlens.diff().long(), output_size=s.tokens)
    positions = torch.arange(s.tokens, device=o.device) - starts
    inputs = {"word": o.parameter(s.vocabulary, s.hidden), "position": o.parameter(max(512, s.longest), s.hidden),
              "segment": o.parameter(2, s.hidden), "weight": o.parameter(s.hidden, mean=1.0),
              "bias": o.parameter(s.hidden)}  # fmt: skip

    def function(word, position, segment, weight, bias) -> Tensor:
        return ops.embedding_layernorm(
            ids, positions, positions % 2, word, position, segment, weight, bias, eps=EPS, padding_idx=0,
            **o.keys(s.dropout[1]),
        )  # fmt: skip

    return Batch(function, inputs, o.random(s.tokens, s.hidden))


def bias_gelu(o: Operands) -> Batch:
    s = o.sizes
    inputs = {"x": o.random(s.tokens, s.inner), "bias": o.parameter(s.inner)}
    return Batch(ops.bias_gelu, inputs, o.random(s.tokens, s.inner))


def feed_forward(o: Operands) -> Batch:
    """As a layer has it: one operator where an epilogue is asked for, else two products and GELU between them."""
    s = o.sizes
    inputs = {"x": o.random(s.tokens, s.hidden), "weight_in": o.random(s.inner, s.hidden, scale=0.02),
              "bias": o.parameter(s.inner), "weight_out": o.random(s.hidden, s.inner, scale=0.02)}  # fmt: skip

    def function(x: Tensor, weight_in: Tensor, bias: Tensor, weight_out: Tensor) -> Tensor:
        if ops.fuses_feed_forward(x):
            return ops.feed_forward(x, weight_in, bias, weight_out)
        return ops.bias_gelu(x @ weight_in.T, bias) @ weight_out.T

    return Batch(function, inputs, o.random(s.tokens, s.hidden))


def mlm_loss(o: Operands) -> Batch:
    s = o.sizes
    labels = o.integers(s.vocabulary, s.masked)
    inputs = {"hidden": o.random(s.masked, s.hidden), "word": o.parameter(s.vocabulary, s.hidden),
              "bias": o.parameter(s.vocabulary)}  # fmt: skip

    def function(hidden: Tensor, word: Tensor, bias: Tensor) -> Tensor:
        return ops.mlm_loss(hidden, word, bias, labels)

    return Batch(function, inputs, torch.ones((), device=o.device))


SUBJECTS = {
    f.__name__: f for f in (attention, residual_layernorm, embedding_layernorm, bias_gelu, feed_forward, mlm_loss)
}


class Trial:
    """Tries candidates of one subject at one size."""

    def __init__(self, subject: str, sizes: Sizes, device: str, sets: int = SETS):
        self.subject, self.sizes, self.device = subject, sizes, device
        self.by_library = (subject, sizes.attention) == ("attention", "library")
        make, without = SUBJECTS[subject], replace(sizes, dropout=(0.0, sizes.dropout[1]))
        self.batches = self.compared = [make(Operands(sizes, device, seed)) for seed in range(sets)]
        if self.by_library:
            self.compared = [make(Operands(without, device, seed)) for seed in range(sets)]
        self._default: list[dict[str, tuple[float, float]]] | None = None
        self._recorded: dict[str, list[Callable[[], object]]] = {}
        self._right: set[str] = set()

    @contextlib.contextmanager
    def using(self, choices: Choices) -> Iterator[dict]:
        backend = {"attention": "torch"} if self.by_library else {}
        with dispatch.use_backend(**backend), choice.use(choices) as served:
            yield served

    @functools.cached_property
    def truth(self) -> list[dict[str, Tensor]]:
        return [{name: x.float() for name, x in batch.run(lambda x: x.double()).items()} for batch in self.compared]

    def errors(self, number: int, found: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """By result: the greatest error, and a unit in the last place of the greatest true element. What is float32, as
        sums are, is made of products in the sizes' dtype, whose unit counts."""
        coarse = torch.finfo(dtype_of(self.sizes.dtype)).eps
        return {
            name: (
                float((found[name].float() - true).abs().max()),
                max(coarse, torch.finfo(found[name].dtype).eps) * float(true.abs().max()),
            )
            for name, true in self.truth[number].items()
        }

    @property
    def default(self) -> list[dict[str, tuple[float, float]]]:
        """Errors of the default; raises DefaultWrong where it is wrong itself."""
        if self._default is None:
            with self.using({}):
                self._default = [self.errors(n, batch.run()) for n, batch in enumerate(self.compared)]
        for errors in self._default:
            for name, (error, unit) in errors.items():
                if not error <= ABSOLUTE * unit:
                    units = error / unit
                    raise DefaultWrong(
                        f"{name} of the default is off by {error:.3g}, {units:.0f} units in the last place"
                    )
        return self._default

    def require_right(self, choices: Choices, *, sound: bool) -> None:
        """Raises Wrong where results or machine code are not right (unless that is known to be ``sound``), RuntimeError
        where a kernel did not serve."""
        if repr(choices) in self._right:
            return
        before = kernels()
        for number, batch in enumerate(self.compared):
            with self.using(choices) as served:
                found, again = batch.run(), batch.run()
            if silent := {name for name in choices if name in TABLES} - set(served):
                raise RuntimeError(f"not used, though asked for: {', '.join(sorted(silent))}")
            for name, (error, unit) in self.errors(number, found).items():
                if not same_bits(found[name], again[name]):
                    raise Wrong(f"{name} has other bits the second time")
                if not error <= FACTOR * self.default[number][name][0] + FLOOR * unit:
                    raise Wrong(f"{name} is off by {error:.3g}, the default by {self.default[number][name][0]:.3g}")
        if self.by_library and self.sizes.dropout[0]:
            self.require_one_mask(choices)
        if not sound:
            require_all_sound(before)
        self._right.add(repr(choices))

    def require_one_mask(self, choices: Choices) -> None:
        """Raises Wrong where a library's backward had another mask than its forward."""
        for batch in self.batches:
            with self.using(choices):
                leaves = {name: x.detach().requires_grad_() for name, x in batch.inputs.items()}
                out = batch.function(**leaves)
                (grad,) = torch.autograd.grad(out, [leaves["qkv"]], out.detach())
            squares = out.detach().double().square().sum()
            products = (leaves["qkv"].detach()[:, 2].double() * grad[:, 2].double()).sum()
            if not abs(products - squares) <= MASKS * squares:
                raise Wrong(f"the backward's mask is not the forward's: {float(products / squares):.4f} in place of 1")

    def recorded(self, choices: Choices) -> list[Callable[[], object]]:
        """What runs each of the batches once more."""
        key = repr(choices)
        if key not in self._recorded:
            self._recorded[key] = [self._record(batch, choices) for batch in self.batches]
        return self._recorded[key]

    def _record(self, batch: Batch, choices: Choices) -> Callable[[], object]:
        def run() -> None:
            with self.using(choices):
                batch.run()

        if self.device != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, first: Choices, second: Choices) -> tuple[list[float], list[float]]:
        """REPEAT times of each, in turn, ``first`` before ``second``."""
        for other in self._recorded.keys() - {repr(first), repr(second)}:
            del self._recorded[other]  # graphs hold memory
        calls = [self.recorded(first), self.recorded(second)]
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(REPEAT + 1):
            for found, batches in zip(times, calls, strict=True):
                elapsed = self._seconds(batches[turn % len(batches)])
                if turn:  # the first turn finds its memory
                    found.append(elapsed)
        return times

    def _seconds(self, call: Callable[[], object]) -> float:
        if self.device != "cuda":
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def same_bits(found: Tensor, again: Tensor) -> bool:
    """Whether two results are equal, element by element."""
    return torch.equal(found, again)


def kernels() -> list:
    """What Triton has compiled in this process of this engine's kernels."""
    found = []
    for kernel in _functions():
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            found += [compiled for compiled in cache.values() if hasattr(compiled, "asm")]
    return found


def _functions() -> list:
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("bert_fast.kernels.")]
    return [value for module in modules for value in vars(module).values() if hasattr(value, "device_caches")]


def disassembled(cubin: bytes | None) -> str | None:
    """What cuobjdump lists; None where it does not."""
    if cubin is None:
        return None
    try:
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (ImportError, AttributeError, RuntimeError, OSError, subprocess.CalledProcessError):
        return None


def require_all_sound(but: list) -> None:
    """:func:`require_sound` of all kernels that were not there before."""
    known = set(map(id, but))
    for kernel in kernels():
        if id(kernel) not in known:
            require_sound(kernel)


def require_sound(compiled) -> None:
    """Raises Wrong where the machine code breaks a rule that is not known and tolerated of these versions. Where there
    is no disassembler, or no machine code of NVIDIA's, nothing is asked."""
    code = disassembled(compiled.asm.get("cubin"))
    if code is None:
        return
    capability, listing = compiled.metadata.target.arch, sass.Listing.parse(code)
    versions = compilers.triton_version() or "0", compilers.ptxas_version(capability) or "0"
    faults = compilers.known_faults(*versions, capability)
    for rule, check in sass.RULES.items():
        if (findings := check(listing)) and not compilers.tolerated(rule, faults):
            raise Wrong(f"machine code: {findings[0]}")


@functools.lru_cache(maxsize=1)
def _trial(subject: str, sizes: Sizes, device: str, sets: int = SETS) -> Trial:
    return Trial(subject, sizes, device, sets)


def answer(message: dict) -> dict:
    """{"times", "replaced"} of ``message``'s challenger beside its incumbent, or {"wrong"} or {"failed"} with why."""
    try:
        trial = _trial(message["subject"], Sizes.of(message["sizes"]), message["device"])
        incumbent, challenger = (choices_of(message[who]) for who in ("incumbent", "challenger"))
        trial.require_right(challenger, sound=message["sound"])
        replaced = {name: choice.replaced(name) for name in challenger}
        first = trial.seconds(incumbent, challenger)
        second = trial.seconds(challenger, incumbent)[::-1]
        return {"times": [first, second], "replaced": replaced}
    except Wrong as error:
        return {"wrong": str(error)}
    except DefaultWrong as error:
        return {DEFAULT_WRONG: str(error)}
    except Exception as error:  # too many registers, too much shared memory, no Gluon: not one to take
        _trial.cache_clear()
        raise_if_device_lost()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def compiled(message: dict) -> dict:
    """Has Triton compile, into its cache, what the challengers of ``message`` launch on a batch of two sequences.

    Gives {"unsound"}: for each why its machine code breaks a rule, None, or False where it did not come to that.
    """
    from triton.runtime.jit import JITFunction

    sizes = Sizes.of(message["sizes"])
    few = replace(sizes, lengths=sizes.lengths[:2], masked=min(sizes.masked, 64))
    run, unsound = JITFunction.run, []
    JITFunction.run = lambda self, *args, **options: run(self, *args, **options | {"warmup": True})
    try:
        for subject, choices in message["challengers"]:
            before = kernels()
            why: str | bool | None = None
            try:
                trial = _trial(subject, few, message["device"], 1)
                with trial.using(choices_of(choices)):
                    trial.batches[0].run()
                require_all_sound(before)
            except Wrong as error:
                why = str(error)
            except Exception:  # it will fail again where it is tried, and say so
                why = False
            unsound.append(why)
    finally:
        JITFunction.run = run
    return {"unsound": unsound}


def choices_of(values: dict) -> Choices:
    """Choices as JSON has them, whose tables have numbers as keys."""
    return {name: store.table(found) for name, found in values.items()}
