"""One update: micro-batches forward and backward, the global gradient norm, the optimiser.

Accumulation over micro-batches and ranks gives the update of the large batch: losses are sums divided by the number
of predicted tokens and sequences of the *whole update*, so gradients simply add up. Dropout is keyed by the seed
set before every forward and by the sequence's slot in the update, so it is the same however the update is dealt.

A process that trains alone owns its gradients: products write the weights' and add later micro-batches' in place
(bert_fast/linear.py). Where gradients travel, and for weights with hooks, they are autograd's ordinary ones.

On a GPU bert_fast/train/recorded.py replays the same functions from CUDA graphs.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bert_fast import optim
from bert_fast.linear import gradients_in_place
from bert_fast.model.losses import cross_entropy
from bert_fast.products import sums_in_float32
from bert_fast.train.distributed import Ranks

Tensor = torch.Tensor


class Outcome:
    """What an update did. On a GPU it is on its way to the host: a reader waits for this update, for none after it.

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
    else everything is in the parameters' dtype. Products round to 16 bits once, cuBLAS's default notwithstanding.
    ``masks_by_place``: a library draws dropout masks by where an element lies; then each micro-batch and rank has a
    seed of its own, as masks of one seed would be the same in all.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, bf16: bool,
        masks_by_place: bool = False,
    ):  # fmt: skip
        self.model, self.ranks, self.bf16, self.masks_by_place = model, ranks, bf16, masks_by_place
        self.optimizer: Any = optimizer  # its step takes a norm, as those of bert_fast.optim do, sharded or not
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parallel: Any = _parallel(model, ranks)  # the model, or one with ``no_sync``
        names = ("num_items_in_batch", "num_sequences_in_batch")
        self._counts = {name: torch.zeros((), device=ranks.device) for name in names}
        self._totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        self._norm = torch.zeros((), device=ranks.device)

    def __call__(
        self, batches: Sequence[dict], *, seed: int, lr: float | Tensor, predicted: int | Tensor, sequences: int,
        stop: bool = False,
    ) -> Outcome:  # fmt: skip
        """One update of this rank's packed ``batches`` (on any device).

        ``seed`` fixes the dropout masks; ``predicted`` tokens and ``sequences`` are those of the whole update, over
        all ranks. ``stop`` is this rank's wish, which the others learn with the losses. Where the loss or the
        gradient norm is not finite, the weights stay as they are.
        """
        self._begin(lr, predicted, sequences, stop)
        parts = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            quiet = contextlib.nullcontext() if last or self.ranks.world == 1 else self.parallel.no_sync()
            batch = moved(batch, self.ranks.device)
            torch.manual_seed(self._seed(seed, number))
            with quiet:
                parts.append(self._differentiate(batch))
            self._totals[:2].add_(parts[-1])
        self._apply()
        return self._outcome(parts)

    def _seed(self, seed: int, number: int) -> int:
        """That of micro-batch ``number``."""
        return derived_seed(seed, self.ranks.rank, number) if self.masks_by_place else seed

    def prepare(self, examples: Sequence[dict]) -> None:
        """Does nothing: an eager step takes batches of any shapes. A recorded one gets ready for ``examples``."""

    def _begin(self, lr: float | Tensor, predicted: int | Tensor, sequences: int, stop: bool) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"] if "scale" in group else lr
        for p in self.parameters:
            p.grad = None
        for count, number in zip(self._counts.values(), (predicted, sequences), strict=True):
            if isinstance(number, Tensor):
                count.copy_(number)
            else:  # the device itself writes a number: a copy from the host would wait
                count.fill_(number)
        self._totals[:2].zero_()
        self._totals[2:].fill_(float(stop))

    def _differentiate(self, batch: dict, into: dict[Tensor, Tensor] | None = None) -> Tensor:
        """Gradients of the batch's part of the update's loss; that part as (MLM, NSP), float32 (2,).

        The first gradients of weights are written ``into`` this memory where it is given.
        """
        own = gradients_in_place(self.parameters, into) if self.ranks.world == 1 else contextlib.nullcontext()
        with own, sums_in_float32():
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
                hidden = torch.bfloat16 if self.bf16 else None
                output = self.parallel(**batch, **self._counts, hidden_dtype=hidden)
            # DistributedDataParallel averages gradients over ranks, which are to be summed
            (output.loss * self.ranks.world).backward()
        loss, labels = output.loss.detach(), batch.get("next_sentence_label")
        if labels is None:
            return torch.stack([loss, torch.zeros_like(loss)]).float()
        logits = output.seq_relationship_logits.detach().float()
        nsp = cross_entropy(logits, labels, self._counts["num_sequences_in_batch"])
        return torch.stack([loss - nsp, nsp]).float()

    def _apply(self) -> None:
        """The optimiser's step by the gradients that are there, which it drops."""
        self.ranks.sum(self._totals)
        norm = optim.grad_norm(self.parameters)
        self._norm.copy_(norm + (0 * self._totals).sum())  # NaN where a loss is not finite
        self.optimizer.step(grad_norm=self._norm)
        self.optimizer.zero_grad(set_to_none=True)

    def _outcome(self, parts: list[Tensor]) -> Outcome:
        return Outcome(torch.cat([self._totals, self._norm.double().reshape(1)]), torch.stack(parts))


def _parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """``model``, whose gradients are averaged over the ranks where there are several."""
    if ranks.world == 1:
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    named = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it and warns of the old
    synced = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    settings: dict[str, Any] = {synced: False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **settings)


def moved(batch: dict, device: torch.device, *, copy: bool = False) -> dict:
    """``batch`` with its tensors on ``device``, without waiting for them; in memory of its own with ``copy``."""
    return {
        name: value.to(device, non_blocking=True, copy=copy) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
