"""Are the numbers right? Loss and every parameter's gradient, ours and the reference's, each against float64.

Same weights, same batch, dropout 0: the reference in float64 is the truth; the reference in the benchmark's dtype
says what that dtype costs. An error is the L2 norm of the difference over the L2 norm of the truth (over 0.1 % of
the typical gradient where the truth is smaller: a key's bias has a gradient of exactly 0). Ours passes where its
error is at most FACTOR times the reference's own plus a floor.
"""

import math

import torch
import transformers
from variants import precision
from workload import Batch

import bert_fast

FACTOR = 1.5
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
        scale = float(true.norm())
        if name != "loss":
            scale = max(scale, 1e-3 * typical * math.sqrt(true.numel()))
        error = float((ours[name] - true).norm()) / scale
        reference_error = float((reference[name] - true).norm()) / scale
        bound = FACTOR * reference_error + floor
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
