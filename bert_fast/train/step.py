"""One update: micro-batches forward and backward, the global gradient norm, the optimiser.

Accumulation over micro-batches and ranks gives the update of the large batch: losses are sums divided by the number
of predicted tokens and sequences of the *whole update*, so gradients simply add up. Dropout is keyed by the seed
set before every forward and by the sequence's slot in the update, so it is the same however the update is dealt.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bert_fast import optim
from bert_fast.model.losses import cross_entropy
from bert_fast.train.distributed import Ranks


class Outcome(NamedTuple):
    """What an update did, as tensors on the device (reading them waits for it).

    scalars  float64 (4,): MLM loss, NSP loss (both of the whole update), how many ranks asked to stop, and the
             gradient norm before clipping; the update was applied where all are finite
    finite   bool (micro-batches,): whether the loss of each micro-batch of this rank was
    """

    scalars: torch.Tensor
    finite: torch.Tensor


def derived_seed(*parts) -> int:
    """A seed in 0 .. 2**63 - 1 that is a function of ``parts`` (numbers and strings) alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Step:
    """Applies updates to ``model`` (BertForPreTraining on the ranks' device)."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, bf16: bool):
        self.model, self.optimizer, self.ranks, self.bf16 = model, optimizer, ranks, bf16
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parallel: nn.Module = model
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def __call__(
        self, batches: Sequence[dict], *, seed: int, lr: float, predicted: int | torch.Tensor, sequences: int,
        stop: bool = False,
    ) -> Outcome:  # fmt: skip
        """One update of this rank's packed ``batches`` (on any device).

        ``seed`` fixes the dropout masks; ``predicted`` tokens and ``sequences`` are those of the whole update, over
        all ranks. ``stop`` is this rank's wish, which the others learn with the losses. Where the loss or the
        gradient norm is not finite, the weights stay as they are.
        """
        device = self.ranks.device
        self.model.train()
        counts = {
            "num_items_in_batch": _on_device(predicted, device),
            "num_sequences_in_batch": _on_device(sequences, device),
        }
        totals, finite = torch.zeros(3, dtype=torch.float64, device=device), []
        totals[2] = stop
        for number, batch in enumerate(batches):
            batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
            last = number == len(batches) - 1
            quiet = contextlib.nullcontext() if last or self.ranks.world == 1 else self.parallel.no_sync()
            with quiet:
                torch.manual_seed(seed)
                loss, parts = self._forward(batch, counts)
                # DistributedDataParallel averages gradients over ranks, which are to be summed
                (loss * self.ranks.world).backward()
            totals[:2] += parts
            finite.append(torch.isfinite(parts).all())
        self.ranks.sum(totals)
        norm = optim.grad_norm(self.parameters)
        norm = torch.where(torch.isfinite(totals).all(), norm, torch.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(grad_norm=norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(torch.cat([totals, norm.double().reshape(1)]), torch.stack(finite))

    def _forward(self, batch: dict, counts: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's part of the update's loss, and the same as (MLM, NSP), float32 (2,) without gradient."""
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.parallel(**batch, **counts)
        loss, labels = output.loss, batch.get("next_sentence_label")
        nsp = torch.zeros_like(loss.detach())
        if labels is not None:
            logits = output.seq_relationship_logits.detach().float()
            nsp = cross_entropy(logits, labels, counts["num_sequences_in_batch"])
        return loss, torch.stack([loss.detach() - nsp, nsp])


def _on_device(count: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``count`` as a float32 scalar, filled in on the device: copying a number there would wait for it."""
    return count if torch.is_tensor(count) else torch.full((), count, dtype=torch.float32, device=device)
