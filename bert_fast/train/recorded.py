"""An update replayed from CUDA graphs: a graph a micro-batch, the last one's with norm, clipping and optimiser.

What is recorded are the functions that the eager step (bert_fast/train/step.py) runs, so the bits are the same. What
changes from update to update is in tensors that stay where they are: the batch, the counts, the learning rate, and the
gradients that one micro-batch leaves for the next. How a function is recorded: bert_fast/train/cuda_graphs.py.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from bert_fast import optim
from bert_fast.train.cuda_graphs import Recorder, Recording
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Outcome, Step, moved

Tensor = torch.Tensor


def recordable(ranks: Ranks) -> bool:
    """Whether steps of these processes can be recorded: of one alone on a GPU. Between several gradients travel."""
    return ranks.world == 1 and ranks.device.type == "cuda"


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, bf16: bool, capture: bool = True,
    masks_by_place: bool = False, tell: Callable[[str], None] = warnings.warn,
) -> Step:  # fmt: skip
    """The step to train with here: a :class:`RecordedStep` where ``ranks`` can have one and ``capture`` asks for it,
    else a :class:`Step`. ``tell`` gets the reason where recording fails."""
    if not (capture and recordable(ranks)):
        return Step(model, optimizer, ranks, bf16=bf16, masks_by_place=masks_by_place)
    recorder = Recorder(model.parameters())
    return RecordedStep(model, optimizer, ranks, bf16=bf16, masks_by_place=masks_by_place, recorder=recorder, tell=tell)


class RecordedStep(Step):
    """A :class:`Step` that replays updates of the shapes given to :meth:`prepare`, and runs all others eagerly.

    Where recording fails, ``tell`` gets the reason, and this update and all after it run eagerly, to the same bits.
    """

    _address: int | None
    _versions: list[int]

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, bf16: bool, recorder: Recorder,
        masks_by_place: bool = False, tell: Callable[[str], None] = warnings.warn,
    ):  # fmt: skip
        super().__init__(model, optimizer, ranks, bf16=bf16, masks_by_place=masks_by_place)
        self.recorder: Recorder | None = recorder
        self.tell = tell
        self._with_masters = [p for p in self.parameters if p.dtype in (torch.bfloat16, torch.float16)]
        self._rate = torch.zeros((), dtype=torch.float64, device=ranks.device)  # float64: exactly the number
        self._part = torch.zeros(2, device=ranks.device)
        self._forget()

    def __call__(
        self, batches: Sequence[dict], *, seed: int, lr: float | Tensor, predicted: int | Tensor, sequences: int,
        stop: bool = False,
    ) -> Outcome:  # fmt: skip
        """As :meth:`Step.__call__`."""
        if self._stale():
            self.prepare(list(self._inputs.values()))
        self._rate.fill_(lr)
        shapes = [_shape(batch) for batch in batches]
        if all(shape in self._inputs for shape in shapes):
            self._begin(self._rate, predicted, sequences, stop)
            parts = []
            for number, (batch, shape) in enumerate(zip(batches, shapes, strict=True)):
                run = self._recorded(batch, shape, first=number == 0, last=number == len(batches) - 1)
                torch.manual_seed(self._seed(seed, number))
                run()
                parts.append(self._part.clone())
            outcome = self._outcome(parts)
        else:  # all of it: an eager micro-batch leaves its gradients where no graph looks for them
            update: dict[str, Any] = {"predicted": predicted, "sequences": sequences, "stop": stop}
            outcome = super().__call__(batches, seed=seed, lr=self._rate, **update)
        self._versions = self._versions_now()
        return outcome

    def prepare(self, examples: Sequence[dict]) -> None:
        """Gets ready to record updates of batches like ``examples``, packed, and of no others; trains nothing.

        What was recorded before is forgotten: its shapes run eagerly from now on. Where recording has failed, nothing
        is prepared.
        """
        if not self.recorder:
            return
        self.recorder.forget()  # waits: a graph that is being replayed, and what it reads, may not go
        self._forget()
        skipped, device = self.optimizer.skipped.clone(), self.ranks.device
        self._rate.zero_()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in examples:
                inputs = moved(batch, device, copy=True)
                self._inputs[_shape(batch)] = inputs
                self._begin(self._rate, 1, 1, False)
                for _ in range(2):  # the second time adds to the gradients of the first
                    self.recorder.warm(functools.partial(self._rehearse, inputs))
                self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.skipped.copy_(skipped)
        self._address, self._versions = self.parameters[0].data_ptr(), self._versions_now()

    @property
    def captured(self) -> int:
        """How many functions have been recorded for the shapes prepared."""
        return len(self._graphs)

    def _forget(self) -> None:
        self._inputs: dict[tuple, dict] = {}  # what a graph reads, by the shapes of batches
        self._graphs: dict[tuple, Recording] = {}  # by shapes, first, last
        self._gradients: dict[Tensor, Tensor] | None = None  # between two micro-batches
        self._trained: list[list[Tensor]] = []  # parameters with gradients, those that share memory together
        self._address, self._versions = None, []

    def _stale(self) -> bool:
        """Whether the model was moved or the optimiser's state loaded since, as graphs read addresses; or weights that
        have float32 masters were written to, which the optimiser's Python takes over and a graph would overwrite."""
        return bool(self._inputs) and (
            self._address != self.parameters[0].data_ptr()
            or any(group["lr"] is not self._rate for group in self.optimizer.param_groups)
            or self._versions != self._versions_now()
        )

    def _versions_now(self) -> list[int]:
        return [p._version for p in self._with_masters]

    def _rehearse(self, inputs: dict) -> None:
        """Does everything that will be recorded, and changes nothing: the optimiser skips a norm of NaN."""
        self._differentiate(inputs)
        sharing: dict[int, list[Tensor]] = {}
        for p in self.parameters:
            if p.grad is not None:
                sharing.setdefault(p.grad.untyped_storage().data_ptr(), []).append(p)
        self._trained = list(sharing.values())
        optim.grad_norm(self.parameters)
        self._norm.fill_(torch.nan)
        self.optimizer.step(grad_norm=self._norm)

    def _recorded(self, batch: dict, shape: tuple, first: bool, last: bool) -> Callable[[], None]:
        """What runs the micro-batch: its graph, with the inputs in place; where recording has failed, the function."""
        key = (shape, first, last)
        try:
            if self.recorder and key not in self._graphs:
                self._graphs[key] = self._record(*key)
        except Exception as error:  # whatever it is, the same micro-batch runs eagerly next and shows it if it must
            self._give_up(error)
        if not self.recorder:
            return functools.partial(self._micro_batch, moved(batch, self.ranks.device), last)
        for name, buffer in self._inputs[shape].items():
            if isinstance(buffer, Tensor):
                buffer.copy_(batch[name], non_blocking=True)
        return self._graphs[key]

    def _record(self, shape: tuple, first: bool, last: bool) -> Recording:
        """Gradients begin as products and autograd make them, without a buffer of zeros that they would be added to,
        and where the update is not at its end they are left where the next micro-batch finds them."""
        if not last and self._gradients is None:
            self._gradients = self._memory()
        if not first:
            assert self._gradients is not None  # the first one's
            for p in self.parameters:
                p.grad = self._gradients.get(p)
        inputs, kept = self._inputs[shape], self._gradients if first and not last else None
        assert self.recorder is not None
        return self.recorder.record(lambda: self._micro_batch(inputs, last, kept))

    def _micro_batch(self, batch: dict, last: bool, kept: dict[Tensor, Tensor] | None = None) -> None:
        """What the eager step does with a micro-batch, and after the ``last`` of an update. Gradients that begin here
        end in ``kept`` where that is given."""
        self._part.copy_(self._differentiate(batch, kept))
        self._totals[:2].add_(self._part)
        if kept:
            elsewhere = [p for p in kept if p.grad is not kept[p]]
            torch._foreach_copy_([kept[p] for p in elsewhere], [cast(Tensor, p.grad) for p in elsewhere])
        if last:
            self._apply()

    def _memory(self) -> dict[Tensor, Tensor]:
        """Memory for gradients; where several shared theirs, as those of one product do, they lie side by side."""
        found: dict[Tensor, Tensor] = {}
        for sharing in self._trained:
            sizes = [p.numel() for p in sharing]
            parts = sharing[0].detach().new_empty(sum(sizes)).split(sizes)
            found.update((p, part.view(p.shape)) for p, part in zip(sharing, parts, strict=True))
        return found

    def _give_up(self, error: Exception) -> None:
        """Eager from here on. Gradients that graphs of this update have left stay the parameters' own."""
        assert self.recorder is not None
        self.recorder.forget()
        self.recorder = None
        self._forget()
        guess = "Something in it waits for the device or depends on a tensor's value (a hook of your own?). "
        if isinstance(error, torch.OutOfMemoryError):
            guess = "Smaller micro-batches (--micro-tokens) need less memory. "
        self.tell(
            f"the training step could not be recorded as a CUDA graph: {type(error).__name__}: {error}. {guess}"
            "It runs without, to the same numbers; --no-capture does not try"
        )


def _shape(batch: dict) -> tuple:
    """What two batches have in common that one graph serves."""
    return tuple((k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, v) for k, v in sorted(batch.items()))
