"""Who is compared, and the one way to build each: this engine's product, its candidates, what others publish.

A contender's step is what its own users train with: of ours the step of ``bert-fast pretrain``
(bert_fast/train/) with its defaults on the device, of transformers' models the loop of its documentation, with
PyTorch's fused AdamW.
"""

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import ModelOutput

import bert_fast
from benchmarks import onnx_openvino
from benchmarks.workload import Batch
from bert_fast import choice, optim
from bert_fast.run.config import PretrainConfig
from bert_fast.run.optimizer import build_optimizer
from bert_fast.train.distributed import Ranks
from bert_fast.train.recorded import make_step

Tensor = torch.Tensor

RATE = 1e-6  # of the updates that are timed
DEFAULTS = PretrainConfig(data="of no run", out="of no run", lr=RATE)


@dataclass(frozen=True)
class Contender:
    """``library`` is whose it is, ``attention`` the form that transformers computes it in; ``ours`` says how."""

    about: str
    library: str = "transformers"
    attention: str = "sdpa"
    published: bool = True  # as its library has it
    ours: "Ours | None" = None


@dataclass(frozen=True)
class Ours:
    """How our step is run where it is not as the product has it: not ``captured`` on a GPU, ``weights`` in 16 bits, or
    with candidate kernels: ``choices`` (bert_fast/choice.py), for compute ``capabilities`` alone."""

    captured: bool = True
    weights: torch.dtype = torch.float32
    choices: dict[str, dict] = field(default_factory=dict, hash=False)
    capabilities: tuple[int, ...] = ()


def _everywhere(*names: str) -> dict[str, dict]:
    """Choices that have the kernels ``names`` serve whatever the length, on the devices that they are for."""
    return {name: {90: 1, 100: 1} for name in names}


def _engine(about: str, **how) -> Contender:
    return Contender(about, library="bert_fast", published=False, ours=Ours(**how))


_ONE_PASS, _ASYNCHRONOUS = _everywhere("attention.one_pass"), _everywhere("attention.asynchronous")
_EPILOGUE = _everywhere("feed_forward.fwd_epilogue", "feed_forward.bwd_epilogue")
CONTENDERS = {
    "bert_fast": _engine("this engine: the step of `bert-fast pretrain`, packed; on a GPU captured"),
    "bert_fast-eager": _engine("the same step on a GPU, not captured", captured=False),
    "bert_fast-16bit": _engine("the same step, weights in 16 bits", weights=torch.bfloat16),
    "bert_fast-one-pass": _engine("with attention's backward in one pass", choices=_ONE_PASS, capabilities=(90,)),
    "bert_fast-asynchronous": _engine(
        "with attention's products beside its softmax", choices=_ASYNCHRONOUS, capabilities=(90,)
    ),
    "bert_fast-epilogue": _engine("with GELU in its product's epilogue", choices=_EPILOGUE, capabilities=(90, 100)),
    "bert_fast-candidates": _engine(
        "with all three of them", choices=_ONE_PASS | _ASYNCHRONOUS | _EPILOGUE, capabilities=(90,)
    ),
    "hf-eager": Contender("transformers, eager attention", attention="eager"),
    "hf-sdpa": Contender("transformers, scaled_dot_product_attention"),
    "hf-compile": Contender("transformers (sdpa) under torch.compile"),
    "hf-flash": Contender("transformers, flash-attn", attention="flash_attention_2"),
    "hf-masked-head": Contender(
        "transformers (eager), its MLM head run on masked positions only", attention="eager", published=False
    ),
    "onnxruntime": Contender("ONNX Runtime's optimised BERT, with --mode encode", "onnxruntime", "eager"),
    "onnxruntime-int8": Contender("the same, quantised, with --mode encode", "onnxruntime", "eager"),
    "openvino": Contender("OpenVINO, with --mode encode", "openvino"),
    "openvino-int8": Contender("the same, quantised by NNCF, with --mode encode", "openvino"),
}
PEERS = tuple(name for name in CONTENDERS if name != "bert_fast")
REFERENCES = tuple(name for name in PEERS if CONTENDERS[name].library == "transformers")
CANDIDATES = tuple(name for name in PEERS if CONTENDERS[name].ours and CONTENDERS[name].ours.choices)


@dataclass(frozen=True)
class Setting:
    """What every contender of a table is asked for. ``optimizer`` is none, adamw or lamb."""

    device: str
    dtype: torch.dtype
    train: bool = True
    nsp: bool = True
    optimizer: str = "none"


def capability(device: str) -> int | None:
    """The compute capability, 10 times the major number plus the minor one; None of a CPU."""
    if device != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def why_unavailable(name: str, setting: Setting) -> str | None:
    """Why a contender cannot run here, or None where it can. ValueError for a name that is none."""
    if name not in CONTENDERS:
        raise ValueError(f"unknown peer {name!r}; the peers are {', '.join(PEERS)}")
    ours, here = CONTENDERS[name].ours, capability(setting.device)
    if ours and name != "bert_fast":
        if not setting.train:
            return "it is a step of training"
        if not ours.captured and here is None:
            return "on a CPU no step is captured: it is bert_fast"
        if ours.capabilities and here not in ours.capabilities:
            this = "this is a CPU" if here is None else f"this GPU has {here / 10}"
            return f"it is for compute capability {' and '.join(str(c / 10) for c in ours.capabilities)}, and {this}"
    if name == "hf-flash" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if name == "hf-flash" and here is None:
        return "flash-attn needs a GPU"
    if name == "hf-masked-head" and not (setting.train and setting.nsp):
        return "it is for MLM + NSP training"
    if name in onnx_openvino.PACKAGES:
        if setting.train:
            return "it encodes only: --mode encode"
        return onnx_openvino.why_unavailable(name, setting.device)
    return None


class MaskedHead(transformers.BertForPreTraining):
    """The reference with its MLM head on masked positions only: it shows what the head alone is worth."""

    def forward(self, labels=None, next_sentence_label=None, **inputs):
        outputs = self.bert(**inputs)
        at = (labels != -100).nonzero(as_tuple=True)
        loss = torch.nn.functional.cross_entropy(self.cls.predictions(outputs[0][at]).float(), labels[at])
        if next_sentence_label is not None:
            nsp = self.cls.seq_relationship(outputs[1])
            loss = loss + torch.nn.functional.cross_entropy(nsp.float(), next_sentence_label)
        return ModelOutput(loss=loss)


def precision(device: str, dtype: torch.dtype):
    """Autocast to ``dtype``, or nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


class Built:
    """A contender with a model: ``model`` on the setting's device, ``form`` of the batches that it takes."""

    def __init__(self, name: str, model: torch.nn.Module, setting: Setting, form: str):
        self.name, self.model, self.setting, self.form = name, model, setting, form
        self.contender, self.ours = CONTENDERS[name], CONTENDERS[name].ours

    @property
    def computes_in(self) -> torch.dtype:
        """What it multiplies in."""
        return onnx_openvino.computes_in(self.name, self.setting.dtype) if self.name in onnx_openvino.PACKAGES else (
            self.setting.dtype
        )  # fmt: skip

    def inputs(self, batch: Batch) -> dict:
        """What the model takes of ``batch``."""
        inputs = dict(getattr(batch, self.form))
        if not self.setting.train:
            for key in ("labels", "next_sentence_label", "masked_positions", "masked_labels"):
                inputs.pop(key, None)
        if self.ours and self.setting.device == "cuda":
            inputs["max_length_q"] = batch.seq  # of a captured step a constant, as in a run
        return inputs

    def encode(self, batch: Batch):
        """What an encoder gives for ``batch``."""
        with torch.inference_mode(), precision(self.setting.device, self.setting.dtype):
            return self.model(**self.inputs(batch))

    def step(self, batch: Batch) -> Callable[..., object]:
        """A function that does one step: an update, forward and backward alone, or encoding.

        Of training it takes another batch of the same shapes too, and another rate; :meth:`loss` reads what it gives.
        """
        setting = self.setting
        if not setting.train:
            if self.contender.library == "openvino":  # here, not in the first step, whose memory is measured
                self.model.compile_for(tuple(self.inputs(batch)["input_ids"].shape))
            return lambda: self.encode(batch)
        return self.trainer(batch, (our_optimizer if self.ours else their_optimizer)(self.model, setting.optimizer))

    def trainer(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[..., object]:
        """:meth:`step` of training, by ``optimizer``."""
        return self._our_trainer(batch, optimizer) if self.ours else self._their_trainer(batch, optimizer)

    def _their_trainer(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
        """The loop of their documentation: clipping to norm 1 before an update."""
        update = (
            optimizer.step if isinstance(optimizer, NoUpdate) else clipped(list(self.model.parameters()), optimizer)
        )

        def step(batch: Batch = batch, rate: float = RATE) -> Tensor:
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.model.zero_grad(set_to_none=True)
            with precision(self.setting.device, self.setting.dtype):
                loss = self.model(**self.inputs(batch)).loss
            loss.backward()
            update()
            return loss.detach()

        return step

    def loss(self, result) -> Tensor:
        """The loss of what a step has given."""
        return result.scalars[:2].sum() if self.ours else result

    def _our_trainer(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[..., object]:
        """What ``bert-fast pretrain`` runs for an update of ``batch``, gradients in place, captured on a GPU.

        Each call draws other dropout masks, and may have another batch of the same shapes and another rate. What is to
        be captured is: raises RuntimeError where recording fails, torch.OutOfMemoryError where that was for want of
        memory, RuntimeError where a candidate kernel did not serve.
        """
        ours, device = self.ours, next(self.model.parameters()).device
        ranks = Ranks(0, 1, device)

        def refuse(reason: str) -> None:
            error = sys.exc_info()[1]
            raise error if isinstance(error, torch.OutOfMemoryError) else RuntimeError(reason)

        products = self.setting.dtype == torch.bfloat16 and ours.weights == torch.float32
        train = make_step(self.model, optimizer, ranks, bf16=products, capture=ours.captured, tell=refuse)
        seeds, served = itertools.count(), set()

        def step(batch: Batch = batch, rate: float = RATE):
            with choice.use(ours.choices) as counted:
                outcome = train(
                    [self.inputs(batch)], seed=next(seeds), lr=rate, predicted=batch.predicted,
                    sequences=len(batch.lengths),
                )  # fmt: skip
            served.update(counted)
            if silent := ours.choices.keys() - served:
                raise RuntimeError(f"not used by the step, though asked for: {', '.join(sorted(silent))}")
            return outcome

        with choice.use(ours.choices):
            train.prepare([self.inputs(batch)])
        return step

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The loss and every gradient of the step that is timed, float64 on the CPU, by parameters' names."""
        kept = Kept(self.model.parameters())
        loss = self.loss(self.trainer(batch, kept)())
        named = {n: kept.gradients[p] for n, p in self.model.named_parameters() if p in kept.gradients}
        return {name: tensor.double().cpu() for name, tensor in ({"loss": loss} | named).items()}

    def attention(self, batch: Batch) -> str | None:
        """The kernel that PyTorch picks for scaled_dot_product_attention on ``batch``; None where none is asked for."""
        if self.contender.library != "transformers" or self.contender.attention != "sdpa":
            return None
        with AttentionSeen() as seen, precision(self.setting.device, self.setting.dtype), \
                torch.set_grad_enabled(self.setting.train):  # fmt: skip
            self.model.forward(**self.inputs(batch))  # not what torch.compile made of it: it asks PyTorch the same
        return seen.kind


class AttentionSeen(TorchDispatchMode):
    """Sees which kernel serves scaled_dot_product_attention: flash, cudnn, efficient, or math (PyTorch's operators)."""

    kind = "math"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if "_scaled_dot_product_" in name and "backward" not in name:
            self.kind = next((k for k in ("flash", "cudnn", "efficient") if k in name), "math")
        return function(*args, **(kwargs or {}))


def build(name: str, config, setting: Setting, *, padding: str = "padded", weights: dict | None = None) -> Built:
    """The contender ``name`` with ``weights`` (a state dict) or freshly initialised ones.

    ``padding`` is what others take: padded (to seq) or longest. Without NSP the reference's BertForPreTraining gives no
    loss, so its BertForMaskedLM stands in.
    """
    torch.manual_seed(0)
    config = type(config)(**config.to_dict())
    contender = CONTENDERS[name]
    kind = "BertForPreTraining" if setting.nsp or contender.ours else "BertForMaskedLM"
    kind = kind if setting.train else "BertModel"
    if contender.ours:
        cls, form = getattr(bert_fast, kind), "packed"
    else:
        config._attn_implementation = contender.attention
        cls, form = MaskedHead if name == "hf-masked-head" else getattr(transformers, kind), padding
    with torch.device(setting.device):  # weights are drawn where they will be
        model = cls(config).train(setting.train)
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or (missing and (setting.nsp or not setting.train)):
            raise ValueError(f"{name} does not take these weights: {missing} are missing, {unexpected} unexpected")
    if contender.ours:
        model = model.to(contender.ours.weights)
    if name == "hf-compile":
        model.compile(dynamic=False)  # a shape of its own for every batch: the fastest that it has
    if name in onnx_openvino.PACKAGES:
        model = onnx_openvino.export(name, model, onnx_openvino.computes_in(name, setting.dtype))
    return Built(name, model, setting, form)


# --------------------------------------------------------------------------------------------------------------
# Optimisers


class NoUpdate(torch.optim.Optimizer):
    """Leaves the weights as they are, for steps that are timed without an optimiser."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.param_groups[0]["params"][0].device)

    def step(self, closure=None, *, grad_norm=None):
        return None


class Kept(NoUpdate):
    """Keeps a copy of every gradient where an optimiser would use it: also inside of a graph."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.gradients: dict[Tensor, Tensor] = {}

    def step(self, closure=None, *, grad_norm=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                if p not in self.gradients:
                    self.gradients[p] = torch.empty_like(p.grad)
                self.gradients[p].copy_(p.grad)


def our_optimizer(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    """What a run has for ``--optimizer``, clipping to norm 1."""
    if name == "none":
        return NoUpdate(model.parameters())
    return build_optimizer(model, replace(DEFAULTS, optimizer=name), Ranks(0, 1, next(model.parameters()).device))


def their_optimizer(model: torch.nn.Module, name: str, *, fused: bool = True) -> torch.optim.Optimizer:
    """PyTorch's AdamW, or a LAMB of PyTorch's operations, which has none; for other names none that does anything."""
    groups = optim.parameter_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=RATE, eps=DEFAULTS.eps, fused=fused, foreach=not fused)
    return ForeachLamb(groups, lr=RATE) if name == "lamb" else NoUpdate(groups)


def clipped(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Clipping to norm 1 and an update, as PyTorch's documentation has them."""

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

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
