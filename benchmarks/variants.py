"""Who is compared: this engine and the reference's variants, each a model and the batch it takes."""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers.modeling_outputs import ModelOutput
from workload import Batch

import bert_fast

DESCRIPTIONS = {
    "bert_fast": "this engine, packed",
    "hf-eager": "transformers, eager attention",
    "hf-sdpa": "transformers, scaled_dot_product_attention",
    "hf-compile": "transformers (sdpa) under torch.compile",
    "hf-flash": "transformers, flash-attn",
    "hf-masked-head": "transformers (eager), its MLM head run on masked positions only",
}
PEERS = tuple(name for name in DESCRIPTIONS if name != "bert_fast")


class MaskedHead(transformers.BertForPreTraining):
    """The reference with its MLM head on masked positions only, so that nobody can say the head alone won."""

    def forward(self, labels=None, next_sentence_label=None, **inputs):
        outputs = self.bert(**inputs)
        at = (labels != -100).nonzero(as_tuple=True)
        loss = torch.nn.functional.cross_entropy(self.cls.predictions(outputs[0][at]).float(), labels[at])
        if next_sentence_label is not None:
            nsp = self.cls.seq_relationship(outputs[1])
            loss = loss + torch.nn.functional.cross_entropy(nsp.float(), next_sentence_label)
        return ModelOutput(loss=loss)


@dataclass
class Variant:
    """A model that takes ``batch_of(batch)``; ``name`` is a key of DESCRIPTIONS."""

    name: str
    model: torch.nn.Module
    batch_of: Callable[[Batch], dict]

    def loss(self, batch: dict) -> torch.Tensor:
        return self.model(**batch).loss


def why_unavailable(name: str, device: str) -> str | None:
    """Why a variant cannot run here, or None where it can."""
    if name not in DESCRIPTIONS:
        raise ValueError(f"unknown peer {name!r}; the peers are {', '.join(PEERS)}")
    if name == "hf-flash":
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed"
        if device != "cuda":
            return "flash-attn needs a GPU"
    return None


def build(name: str, config, device: str, *, train: bool, nsp: bool, padding: str = "padded") -> Variant:
    """The variant ``name`` with freshly initialised weights; ``padding`` is padded (to seq) or longest.

    Without NSP the reference's BertForPreTraining gives no loss, so BertForMaskedLM stands in for all.
    """
    torch.manual_seed(0)
    config = type(config)(**config.to_dict())
    kind = "BertForPreTraining" if nsp else "BertForMaskedLM"
    if not train:
        kind = "BertModel"
    if name == "bert_fast":
        cls, form = getattr(bert_fast, kind), "packed"
    else:
        attention = {"hf-eager": "eager", "hf-masked-head": "eager", "hf-flash": "flash_attention_2"}.get(name, "sdpa")
        config._attn_implementation = attention
        reference = MaskedHead if name == "hf-masked-head" and train else getattr(transformers, kind)
        if name == "hf-masked-head" and not nsp:
            raise ValueError("hf-masked-head is built for MLM + NSP; leave it out with --no-nsp")
        cls, form = reference, padding
    with torch.device(device):  # weights are drawn where they will be
        model = cls(config).train(train)
    if name == "hf-compile":
        model.compile()

    def batch_of(batch: Batch) -> dict:
        inputs = dict(getattr(batch, form))
        if not train:
            for key in ("labels", "next_sentence_label", "masked_positions", "masked_labels"):
                inputs.pop(key, None)
        return inputs

    return Variant(name, model, batch_of)


def precision(device: str, dtype: torch.dtype):
    """Autocast to ``dtype``, or nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def make_step(variant: Variant, batch: Batch, device: str, dtype: torch.dtype, *, train: bool, optimizer: str):
    """A function that does one step: forward and backward (and the optimiser's update), or encoding alone."""
    inputs = variant.batch_of(batch)
    if not train:

        def encode() -> None:
            with torch.inference_mode(), precision(device, dtype):
                variant.model(**inputs)

        return encode
    update = None
    if optimizer == "adamw":
        update = torch.optim.AdamW(variant.model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        variant.model.zero_grad(set_to_none=True)
        with precision(device, dtype):
            loss = variant.loss(inputs)
        loss.backward()
        if update is not None:
            update.step()

    return step
