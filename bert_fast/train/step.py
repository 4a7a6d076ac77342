"""One update: micro-batches forward and backward, the global gradient norm, the optimiser.

Accumulation over micro-batches and ranks gives the update of the large batch: losses are sums divided by the number
of predicted tokens and sequences of the *whole update*, so gradients simply add up. Dropout is keyed by the seed
set before every forward and by the sequence's slot in the update, so it is the same however the update is dealt.

A process that trains alone owns its gradients: products write the weights' and add later micro-batches' in place
(bert_fast/linear.py). Where gradients travel, and for weights with hooks, they are autograd's ordinary ones.

With a recorder (bert_fast/train/captured.py) micro-batches of known shapes are replayed from CUDA graphs, the last
one's with the norm, the clipping and the optimiser in it. What is recorded is the function that runs eagerly, so the
bits are the same. What changes from update to update is in tensors that stay where they are: the batch, the counts, the
learning rate, and the gradients that one micro-batch leaves for the next.
"""

import contextlib
import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bert_fast import optim
from bert_fast.linear import gradients_in_place
from bert_fast.model.losses import cross_entropy
from bert_fast.train.captured import Recorder
from bert_fast.train.distributed import Ranks

Tensor = torch.Tensor


class Outcome:
    """What an update did. On a GPU it is on its way to the host: who reads it waits for this update, for none after it.

    scalars  float64 (4,): MLM loss, NSP loss (both of the whole update), how many ranks asked to stop, and the
             gradient norm before clipping; the update was applied where all are finite
    parts    float32 (micro-batches, 2): what each micro-batch of this rank added to the MLM and to the NSP loss
    """

    def __init__(self, scalars: Tensor, parts: Tensor):
        self._arrived = None
        if scalars.is_cuda:  # copied behind the update: reading the device's tensors would wait for later ones too
            scalars, parts = (
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in (scalars, parts)
            )
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._scalars, self._parts = scalars, parts

    @property
    def scalars(self) -> Tensor:
        self._wait()
        return self._scalars

    @property
    def finite(self) -> Tensor:
        """bool (micro-batches,): whether the loss of each micro-batch of this rank was."""
        self._wait()
        return self._parts.isfinite().all(dim=1)

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


def derived_seed(*parts) -> int:
    """A seed in 0 .. 2**63 - 1 that is a function of ``parts`` (numbers and strings) alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Step:
    """Applies updates to ``model`` (a pre-training model of bert_fast on the ranks' device).

    ``bf16`` computes products in bfloat16 under autocast and has hidden states in it, statistics and sums in float32;
    else everything is in the parameters' dtype. With a ``recorder`` updates of the shapes given to :meth:`prepare` are
    replayed from graphs; where recording fails, ``tell`` gets the reason, and this update and all after it run eagerly,
    to the same bits.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, bf16: bool,
        recorder: Recorder | None = None, tell: Callable[[str], None] = warnings.warn,
    ):  # fmt: skip
        self.model, self.optimizer, self.ranks, self.bf16 = model, optimizer, ranks, bf16
        self.recorder, self.tell = recorder, tell
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._with_masters = [p for p in self.parameters if p.dtype in (torch.bfloat16, torch.float16)]
        self.parallel: nn.Module = model
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            named = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it and warns of the old
            synced = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
            self.parallel = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, **{synced: False}
            )

        def scalar(dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=ranks.device)

        self._counts = {name: scalar(torch.float32) for name in ("num_items_in_batch", "num_sequences_in_batch")}
        self._totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        self._parts, self._norm = torch.zeros(2, device=ranks.device), scalar(torch.float32)
        self._rate = scalar(torch.float64) if recorder else None  # float64: exactly the number
        self._forget()

    def __call__(
        self, batches: Sequence[dict], *, seed: int, lr: float, predicted: int | Tensor, sequences: int,
        stop: bool = False,
    ) -> Outcome:  # fmt: skip
        """One update of this rank's packed ``batches`` (on any device).

        ``seed`` fixes the dropout masks; ``predicted`` tokens and ``sequences`` are those of the whole update, over
        all ranks. ``stop`` is this rank's wish, which the others learn with the losses. Where the loss or the
        gradient norm is not finite, the weights stay as they are.
        """
        if self._stale():
            self.prepare(list(self._inputs.values()))
        self.model.train()
        for count, number in zip(self._counts.values(), (predicted, sequences), strict=True):
            _set(count, number)
        self._totals[2:].fill_(float(stop))
        self._set_rate(lr)
        shapes = [_shape(batch) for batch in batches] if self.recorder else []
        known = bool(shapes) and all(shape in self._inputs for shape in shapes)
        parts = []
        for number, batch in enumerate(batches):
            place = number == 0, number == len(batches) - 1
            run = self._recorded(batch, shapes[number], *place) if known and self.recorder else None
            if run is None:
                batch = _moved(batch, self.ranks.device)
            torch.manual_seed(seed)
            if run is None:
                self._micro_batch(batch, *place)
            else:
                run()
            parts.append(self._parts.clone())
        self._versions = self._versions_now()
        return Outcome(torch.cat([self._totals, self._norm.double().reshape(1)]), torch.stack(parts))

    def prepare(self, examples: Sequence[dict]) -> None:
        """Gets ready to record updates of batches like ``examples``, packed, and of no others; trains nothing.

        Nothing is done without a recorder. What was recorded before is forgotten: its shapes run eagerly from now on.
        """
        if not self.recorder:
            return
        self.recorder.forget()  # waits: a graph that is being replayed, and what it reads, may not go
        self._forget()
        self.model.train()
        for count in self._counts.values():
            count.fill_(1.0)
        self._set_rate(0.0)
        skipped, device = self.optimizer.skipped.clone(), self.ranks.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in examples:
                inputs = _moved(batch, device, copy=True)
                self._inputs[_shape(batch)] = inputs
                for first in (True, False):
                    self.recorder.warm(lambda inputs=inputs, first=first: self._rehearse(inputs, first))
        self.optimizer.skipped.copy_(skipped)
        self._address, self._versions = self.parameters[0].data_ptr(), self._versions_now()

    @property
    def captured(self) -> int:
        """How many functions have been recorded for the shapes prepared."""
        return len(self._graphs)

    def _micro_batch(self, batch: dict, first: bool, last: bool, into: dict[Tensor, Tensor] | None = None) -> None:
        """A micro-batch forward and backward, and after the ``last`` of an update the optimiser: what is recorded.

        The ``first`` one's weight gradients are written ``into`` this memory where it is given.
        """
        if first:
            self._totals[:2].zero_()
            self._set_gradients(None)
        quiet = contextlib.nullcontext() if last or self.ranks.world == 1 else self.parallel.no_sync()
        with quiet:
            self._parts.copy_(self._differentiate(batch, into))
        self._totals[:2].add_(self._parts)
        if last:
            self.ranks.sum(self._totals)
            norm = optim.grad_norm(self.parameters)
            self._norm.copy_(norm + (0 * self._totals).sum())  # NaN where a loss is not finite
            self.optimizer.step(grad_norm=self._norm)
            self.optimizer.zero_grad(set_to_none=True)

    def _differentiate(self, batch: dict, into: dict[Tensor, Tensor] | None = None) -> Tensor:
        """Gradients of the batch's part of the update's loss; that part as (MLM, NSP), float32 (2,)."""
        own = gradients_in_place(self.parameters, into) if self.ranks.world == 1 else contextlib.nullcontext()
        with own:
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
                hidden = torch.bfloat16 if self.bf16 else None
                output = self.parallel(**batch, **self._counts, hidden_dtype=hidden)
            # DistributedDataParallel averages gradients over ranks, which are to be summed
            (output.loss * self.ranks.world).backward()
        loss, labels = output.loss.detach(), batch.get("next_sentence_label")
        if labels is None:
            return torch.stack([loss, torch.zeros_like(loss)])
        logits = output.seq_relationship_logits.detach().float()
        nsp = cross_entropy(logits, labels, self._counts["num_sequences_in_batch"])
        return torch.stack([loss - nsp, nsp])

    def _set_rate(self, lr: float) -> None:
        if self._rate is not None:
            self._rate.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr if self._rate is None else self._rate

    # recorded

    def _forget(self) -> None:
        self._inputs: dict[tuple, dict] = {}  # what a graph reads, by the shapes of batches
        self._graphs: dict[tuple, Callable[[], None]] = {}  # by shapes, first, last
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

    def _rehearse(self, inputs: dict, first: bool) -> None:
        """Does everything that will be recorded, and changes nothing: the optimiser skips a norm of NaN.

        The gradients of a ``first`` time are left for a second one to add to.
        """
        if first:
            self._set_gradients(None)
        self._differentiate(inputs)
        sharing: dict[int, list[Tensor]] = {}
        for p in self.parameters:
            if p.grad is not None:
                sharing.setdefault(p.grad.untyped_storage().data_ptr(), []).append(p)
        self._trained = list(sharing.values())
        optim.grad_norm(self.parameters)
        self._norm.fill_(torch.nan)
        self.optimizer.step(grad_norm=self._norm)
        if not first:
            self.optimizer.zero_grad(set_to_none=True)

    def _recorded(self, batch: dict, shape: tuple, first: bool, last: bool) -> Callable[[], None] | None:
        """What runs the micro-batch from a graph, its inputs in place; None where it cannot be recorded."""
        if (shape, first, last) not in self._graphs:
            try:
                self._record(shape, first, last)
            except Exception as error:  # whatever it is, the same micro-batch runs eagerly next and shows it if it must
                self._give_up(error)
                return None
        for name, buffer in self._inputs[shape].items():
            if isinstance(buffer, Tensor):
                buffer.copy_(batch[name], non_blocking=True)
        return self._graphs[shape, first, last]

    def _record(self, shape: tuple, first: bool, last: bool) -> None:
        """Gradients begin as products and autograd make them, without a buffer of zeros that they would be added to,
        and where the update is not at its end they are left where the next micro-batch finds them."""
        if not last and self._gradients is None:
            self._gradients = self._memory()
        if not first:
            self._set_gradients(self._gradients)
        inputs, kept = self._inputs[shape], self._gradients
        begun = first and not last

        def function() -> None:
            self._micro_batch(inputs, first, last, kept if begun else None)
            if begun:
                elsewhere = [p for p in kept if p.grad is not kept[p]]
                torch._foreach_copy_([kept[p] for p in elsewhere], [p.grad for p in elsewhere])

        self._graphs[shape, first, last] = self.recorder.record(function)

    def _memory(self) -> dict[Tensor, Tensor]:
        """Memory for gradients; where several shared theirs, as those of one product do, they lie side by side."""
        found = {}
        for sharing in self._trained:
            sizes = [p.numel() for p in sharing]
            parts = sharing[0].detach().new_empty(sum(sizes)).split(sizes)
            found.update((p, part.view(p.shape)) for p, part in zip(sharing, parts, strict=True))
        return found

    def _set_gradients(self, gradients: dict[Tensor, Tensor] | None) -> None:
        for p in self.parameters:
            p.grad = gradients.get(p) if gradients else None

    def _give_up(self, error: Exception) -> None:
        """Eager from here on. Gradients that graphs of this update have left stay the parameters' own."""
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


def _set(count: Tensor, number: int | Tensor) -> None:
    """A number is written by the device itself: copying it there would wait."""
    if isinstance(number, Tensor):
        count.copy_(number)
    else:
        count.fill_(number)


def _moved(batch: dict, device: torch.device, copy: bool = False) -> dict:
    return {
        name: value.to(device, non_blocking=True, copy=copy) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _shape(batch: dict) -> tuple:
    """What two batches have in common that one graph serves."""
    return tuple((k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, v) for k, v in sorted(batch.items()))
