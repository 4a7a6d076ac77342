"""What can be tried: for which sizes, and in which order.

A candidate is what choice.use takes. All but attention by a library compute this engine's functions with its masks, so
which of them serves changes rounding alone. A library's attention is asked of its own accord only without dropout,
where its masks are no question, and by the kernel whose backward is deterministic.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from bert_fast import dispatch
from bert_fast.tuning.rule import Choices, Question

HOPPER, EPILOGUE = (90,), (90, 100)  # compute capabilities that have what kernels/experiments/ try


@dataclass(frozen=True)
class Sizes:
    """What a micro-batch of a phase looks like: ``lengths`` of its sequences, at most ``longest`` tokens each, of which
    ``masked`` tokens are predicted. ``dtype`` is that of products ("bfloat16"), ``parameters`` that of weights;
    ``dropout`` of attention and of hidden states. ``attention`` is by "library" (PyTorch's, with dropout too), this
    engine's "own", or "auto", the faster one without dropout."""

    hidden: int
    inner: int
    heads: int
    vocabulary: int
    longest: int
    lengths: tuple[int, ...]
    masked: int
    dtype: str
    parameters: str = "float32"
    dropout: tuple[float, float] = (0.1, 0.1)
    attention: str = "auto"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict) -> "Sizes":
        """That of :meth:`as_dict`."""
        pairs = {name: tuple(values[name]) for name in ("lengths", "dropout")}
        return cls(**values | pairs)


def grid(name: str, **settings) -> list[Choices]:
    """A candidate for each combination of the settings of the launch ``name``."""
    return [{name: dict(zip(settings, values, strict=True))} for values in itertools.product(*settings.values())]


def launches(capability: int) -> Iterator[Question]:
    """Questions about the launch configurations of the kernels that are the default."""
    for name in ("fwd", "dq", "dkv"):
        # dq copies nothing ahead on 10.0: kernels/attention.py says why
        stages = (1,) if name == "dq" and capability >= 100 else (1, 2, 3)
        yield Question(f"attention {name}", "attention", grid(
            f"attention.{name}", BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=stages,
        ))  # fmt: skip
    for operator in ("residual_layernorm", "embedding_layernorm"):
        for name in ("fwd", "bwd"):
            tiles = grid(f"{operator}.{name}", BLOCK_M=(1, 2, 4, 8), num_warps=(1, 2, 4, 8))
            yield Question(f"{operator} {name}", operator, tiles)
    runs = grid("embedding_layernorm.sum", RUN=(16, 32, 64), num_warps=(1, 2, 4))
    yield Question("embedding_layernorm sum", "embedding_layernorm", runs)
    for name in ("fwd", "bwd"):
        tiles = grid(f"bias_gelu.{name}", BLOCK_M=(1, 2, 4, 8), BLOCK_N=(512, 1024), num_warps=(2, 4, 8))
        yield Question(f"bias_gelu {name}", "bias_gelu", tiles)
    tiles = grid("mlm_loss.fwd", BLOCK_M=(1, 2, 4, 8), BLOCK_N=(1024, 2048, 4096), num_warps=(4, 8, 16))
    yield Question("mlm_loss fwd", "mlm_loss", tiles)
    yield Question("mlm_loss chunk", "mlm_loss", grid("mlm_loss.chunk", cuda=(1024, 2048, 8192)))


def epilogue_tiles(name: str) -> list[Choices]:
    """Launch configurations of a product with its epilogue: two programs a multiprocessor, or one with twice the
    columns."""
    return [
        *grid(f"feed_forward.{name}", num_stages=(2, 3), FLATTEN=(False, True)),
        *grid(f"feed_forward.{name}", BLOCK_N=(256,), num_warps=(8,), PROGRAMS=(1,), num_stages=(3, 4),
              FLATTEN=(False, True)),
    ]  # fmt: skip


def epilogues(sizes: Sizes, capability: int) -> Iterator[Question]:
    """Bias and GELU in their product's epilogue, and with which configuration."""
    if capability not in EPILOGUE or sizes.dtype == "float32":
        return
    for name in ("fwd", "bwd"):
        there = {f"feed_forward.{name}_epilogue": {capability: sizes.tokens}}
        tiles = [there | tile for tile in epilogue_tiles(name)]
        yield Question(f"feed_forward {name}", "feed_forward", [there, *tiles])


def attentions(sizes: Sizes, capability: int) -> Iterator[Question]:
    """Other kernels of attention than the portable ones."""
    here = {capability: sizes.longest}
    if capability in HOPPER:
        yield Question("attention asynchronous", "attention", [{"attention.asynchronous": here}])
        yield Question("attention one_pass", "attention", [{"attention.one_pass": here}])
    if sizes.attention == "auto" and not sizes.dropout[0]:
        yield Question("attention by PyTorch", "attention", [{"attention.library": here}])


def questions(sizes: Sizes, capability: int) -> list[Question]:
    """What to decide on a GPU of ``capability`` (90 is 9.0), what matters most first."""
    if sizes.attention == "library":
        own = [Question("attention by PyTorch", "attention", [{"attention.torch": {"kernel": "cudnn"}}])]
    else:
        own = [q for q in launches(capability) if q.subject == "attention"] + [*attentions(sizes, capability)]
    rest = [question for question in launches(capability) if question.subject != "attention"]
    return own + rest + [*epilogues(sizes, capability)]


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name."""
    return getattr(torch, name)


def why_no_library(device_type: str, dtype: torch.dtype, head_size: int, p: float) -> str | None:
    """Why attention by PyTorch does not have such a case, or None where it does."""
    return dispatch.why_no_library(device_type, dtype, head_size, p)
