"""Who is compared: this engine and the reference's variants, each a model and the batch it takes."""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import exported
import torch
import transformers
from transformers.modeling_outputs import ModelOutput
from workload import Batch

import bert_fast
from bert_fast import optim

DESCRIPTIONS = {
    "bert_fast": "this engine, packed",
    "hf-eager": "transformers, eager attention",
    "hf-sdpa": "transformers, scaled_dot_product_attention",
    "hf-compile": "transformers (sdpa) under torch.compile",
    "hf-flash": "transformers, flash-attn",
    "hf-masked-head": "transformers (eager), its MLM head run on masked positions only",
    "onnxruntime": "ONNX Runtime's optimised BERT, with --mode encode",
    "openvino": "OpenVINO, with --mode encode",
}
PEERS = tuple(name for name in DESCRIPTIONS if name != "bert_fast")
DEFAULT_PEERS = tuple(name for name in PEERS if name not in exported.PACKAGES)


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
    model: Callable
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
    return exported.why_unavailable(name, device) if name in exported.PACKAGES else None


def build(
    name: str,
    config,
    device: str,
    *,
    train: bool,
    nsp: bool,
    padding: str = "padded",
    dtype: torch.dtype = torch.float32,
    weights: dict | None = None,
) -> Variant:
    """The variant ``name`` with ``weights`` (a state dict) or freshly initialised ones; ``padding`` is padded (to seq)
    or longest. ``dtype`` counts for exported encoders alone: the others run under autocast, see :func:`make_step`.

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
        forms = {"hf-eager": "eager", "hf-masked-head": "eager", "hf-flash": "flash_attention_2"} | exported.ATTENTION
        config._attn_implementation = forms.get(name, "sdpa")
        reference = MaskedHead if name == "hf-masked-head" and train else getattr(transformers, kind)
        if name == "hf-masked-head" and not nsp:
            raise ValueError("hf-masked-head is built for MLM + NSP; leave it out with --no-nsp")
        cls, form = reference, padding
    with torch.device(device):  # weights are drawn where they will be
        model = cls(config).train(train)
    if weights is not None:
        model.load_state_dict(weights)
    if name == "hf-compile":
        model.compile()
    if name in exported.PACKAGES:
        model = exported.export(name, model, exported.computes_in(name, dtype))

    def batch_of(batch: Batch) -> dict:
        inputs = dict(getattr(batch, form))
        if not train:
            for key in ("labels", "next_sentence_label", "masked_positions", "masked_labels"):
                inputs.pop(key, None)
        return inputs

    return Variant(name, model, batch_of)


def library(name: str) -> str:
    """Whose variant ``name`` is: transformers' ones share a library."""
    return "transformers" if name.startswith("hf-") else name


def precision(device: str, dtype: torch.dtype):
    """Autocast to ``dtype``, or nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def make_step(variant: Variant, batch: Batch, device: str, dtype: torch.dtype, *, train: bool, optimizer: str):
    """A function that does one step: forward and backward (and the optimiser's update), or encoding alone."""
    inputs = variant.batch_of(batch)
    if not train:
        if variant.name == "openvino":  # now, not in the first step, whose memory is measured
            variant.model.compile_for(tuple(inputs["input_ids"].shape))

        def encode() -> None:
            with torch.inference_mode(), precision(device, dtype):
                variant.model(**inputs)

        return encode
    update = make_update(variant, optimizer)

    def step() -> None:
        variant.model.zero_grad(set_to_none=True)
        with precision(device, dtype):
            loss = variant.loss(inputs)
        loss.backward()
        update()

    return step


def make_update(variant: Variant, optimizer: str) -> Callable[[], None]:
    """Clipping to norm 1 and an update of none, adamw or lamb: bert_fast.optim's for ours, PyTorch's for the others."""
    parameters = list(variant.model.parameters())
    if optimizer == "none":
        return lambda: None
    groups = optim.parameter_groups(variant.model)
    if variant.name == "bert_fast":
        kind = {"adamw": optim.AdamW, "lamb": optim.Lamb}[optimizer]
        return kind(groups, lr=1e-6, max_grad_norm=1.0).step
    theirs = {"adamw": lambda: torch.optim.AdamW(groups, lr=1e-6, fused=True), "lamb": lambda: ForeachLamb(groups)}
    step = theirs[optimizer]().step

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        step()

    return clip_and_step


class ForeachLamb(torch.optim.Optimizer):
    """LAMB as published, over lists of tensors with PyTorch's own operations: transformers and PyTorch have none."""

    def __init__(self, groups: list[dict], lr: float = 1e-6, betas=(0.9, 0.999), eps: float = 1e-6):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.01})
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            m, v = ([self.state[p][key] for p in weights] for key in "mv")
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            update = torch._foreach_sqrt(v)
            torch._foreach_div_(update, (1 - beta2**self.steps) ** 0.5)
            torch._foreach_add_(update, group["eps"])
            torch._foreach_reciprocal_(update)
            torch._foreach_mul_(update, m)
            torch._foreach_div_(update, 1 - beta1**self.steps)
            if group["weight_decay"]:
                torch._foreach_add_(update, weights, alpha=group["weight_decay"])
                ratios = torch._foreach_norm(weights)
                torch._foreach_div_(ratios, torch._foreach_norm(update))
                torch._foreach_mul_(update, [r.where(r.isfinite() & (r > 0), 1.0) for r in ratios])
            torch._foreach_add_(weights, update, alpha=-group["lr"])
