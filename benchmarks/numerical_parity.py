"""Are the numbers right? Loss and every parameter's gradient, ours and the reference's, each against float64; or what
encoders give.

Same weights, same batch, dropout 0: the reference in float64 is the truth; the reference in the benchmark's dtype
says what that dtype costs. An error is the L2 norm of the difference over the L2 norm of the truth (over 0.1 % of
the typical gradient where the truth is smaller). Ours passes where its error is at most FACTOR times the reference's
own plus a floor; NOTHING_FACTOR times where the truth is next to nothing: a key's bias has a gradient of exactly 0, so
there one noise is held against another. In 16 bits it is that of rowsum(d out * out), from an output that is rounded,
as in every attention that does not keep its probabilities: PyTorch's own scaled_dot_product_attention in bfloat16 has
1.9 times eager's there (12 heads, 512 tokens of normal numbers; ours 1.0).
"""

import math

import torch
import transformers
from variants import build, library, precision
from workload import Batch

import bert_fast

Tensor = torch.Tensor

FACTOR = 1.5
NOTHING_FACTOR = 3.0
PEER_FACTOR = 4.0  # of other libraries: they round where they like, OpenVINO in bfloat16 the residual stream too
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}


def _loss_and_gradients(model, inputs: dict, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model.train()
    with precision(device, dtype):
        loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double().cpu()} | gradients


def compare(config, batch: Batch, device: str, dtype: torch.dtype, *, nsp: bool, progress) -> list[dict]:
    """Rows {"what", "error", "reference_error", "bound", "passed"}: the loss, then each parameter's gradient.

    ``config`` must have dropout 0. ``progress(text)`` is told what is computed.
    """
    kind = "BertForPreTraining" if nsp else "BertForMaskedLM"
    torch.manual_seed(1)
    progress("parity: the reference in float64")
    reference = getattr(transformers, kind)(config)
    weights = reference.state_dict()
    results = {}
    for name, model, form in (
        ("truth", reference, "padded"),
        ("reference", getattr(transformers, kind)(config), "padded"),
        ("ours", getattr(bert_fast, kind)(config), "packed"),
    ):
        if name != "truth":
            progress(f"parity: {name}")
            model.load_state_dict(weights)
        else:
            weights = {key: value.clone() for key, value in weights.items()}
            model = model.double()
        run_dtype = torch.float32 if name == "truth" else dtype
        results[name] = _loss_and_gradients(model.to(device), getattr(batch, form), device, run_dtype)
        del model
        reference = None
    return rows_of(results["truth"], results["reference"], results["ours"], FLOOR[dtype])


def _encoding(name: str, config, weights: dict, batch: Batch, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a variant gives for the batch's real tokens, one after the other, and for its sequences."""
    variant = build(name, config, device, train=False, nsp=True, dtype=dtype, weights=weights)
    inputs = variant.batch_of(batch)
    with torch.inference_mode(), precision(device, dtype):
        outputs = variant.model(**inputs)
    states = outputs.last_hidden_state
    real = states[0, : batch.real_tokens] if name == "bert_fast" else states[inputs["attention_mask"] != 0]
    return {"last_hidden_state": real.double().cpu(), "pooler_output": outputs.pooler_output.double().cpu()}


def compare_encodings(
    config, batch: Batch, device: str, dtype: torch.dtype, peers: list[str], *, progress
) -> tuple[list[dict], dict[str, str]]:
    """Rows as :func:`compare` has them, of the outputs of ours and of each of ``peers``; and why a peer cannot run.

    The reference is transformers with eager attention; ``peers`` are those of other libraries.
    """
    torch.manual_seed(1)
    progress("parity: the reference in float64")
    reference = transformers.BertModel(config)
    weights = {key: value.clone() for key, value in reference.state_dict().items()}
    padded = {key: batch.padded[key] for key in ("input_ids", "token_type_ids", "attention_mask")}
    with torch.inference_mode():
        outputs = reference.double().eval().to(device)(**padded)
    real = padded["attention_mask"] != 0
    truth = {"last_hidden_state": outputs.last_hidden_state[real].cpu(), "pooler_output": outputs.pooler_output.cpu()}
    del reference, outputs
    found, failed = {}, {}
    for name in ("hf-eager", "bert_fast", *peers):
        progress(f"parity: {name}")
        try:
            found[name] = _encoding(name, config, weights, batch, device, dtype)
        except Exception as error:
            if library(name) in ("transformers", "bert_fast"):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"  # the others still run
    rows = []
    for name in [name for name in found if name != "hf-eager"]:
        for what, true in truth.items():
            scale = float(true.norm())
            error, allowed = (float((found[one][what] - true).norm()) / scale for one in (name, "hf-eager"))
            bound = (FACTOR if name == "bert_fast" else PEER_FACTOR) * allowed + FLOOR[dtype]
            rows.append(
                {
                    "what": what,
                    "variant": name,
                    "error": error,
                    "reference_error": allowed,
                    "bound": bound,
                    "passed": error <= bound,  # False for NaN
                }
            )
    return rows, failed


def rows_of(truth: dict, reference: dict, ours: dict, floor: float) -> list[dict]:
    """The comparison of three dictionaries of float64 tensors with the same names, the truth's."""
    gradients = [t for name, t in truth.items() if name != "loss"]
    elements = sum(t.numel() for t in gradients)
    typical = math.sqrt(sum(float(t.square().sum()) for t in gradients) / elements)
    rows = []
    for name, true in truth.items():
        if name not in ours:
            rows.append({"what": name, "error": math.inf, "reference_error": 0.0, "bound": floor, "passed": False})
            continue
        scale, factor = float(true.norm()), FACTOR
        if name != "loss" and scale < (little := 1e-3 * typical * math.sqrt(true.numel())):
            scale, factor = little, NOTHING_FACTOR
        error = float((ours[name] - true).norm()) / scale
        reference_error = float((reference[name] - true).norm()) / scale
        bound = factor * reference_error + floor
        rows.append(
            {
                "what": name,
                "error": error,
                "reference_error": reference_error,
                "bound": bound,
                "passed": error <= bound,  # False for NaN
            }
        )
    return rows
