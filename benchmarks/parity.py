"""The gate: are the numbers right? The step that is timed, encoders and operators, each against float64.

Same weights, same batch, dropout 0: the reference in float64 is the truth; the reference in the benchmark's dtype,
with the attention that it has by default, says what that dtype costs. In bfloat16 its LayerNorms give 16 bits, as ours
do: held against one another is the same arithmetic. An error is the L2 norm of the difference over the L2 norm of the
truth (over 0.1 % of the typical gradient where the truth is smaller). Ours passes where its error is at most FACTOR
times the reference's own plus a floor;
NOTHING_FACTOR times where the truth is next to nothing: a key's bias has a gradient of exactly 0, so there one noise is
held against another. In 16 bits it is that of rowsum(d out * out), from an output that is rounded, as in every
attention that does not keep its probabilities: PyTorch's own scaled_dot_product_attention in bfloat16 has 1.9 times
eager's there (12 heads, 512 tokens of normal numbers; ours 1.0).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.contenders import CONTENDERS, Built, Setting, build
from benchmarks.operators import build_case
from benchmarks.results import reason
from benchmarks.workload import Batch, model_config
from bert_fast import choice, dispatch

Tensor = torch.Tensor

FACTOR = 1.5
NOTHING_FACTOR = 3.0
PEER_FACTOR = 4.0  # of other libraries: they round where they like, OpenVINO in bfloat16 the residual stream too
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}
INT8_BOUND = 0.25  # what is quantised has an error of its own making: it is shown, and no more than this
# By how much a candidate's step may differ from ours as built, with the same dropout: of the loss (in bfloat16 a unit
# in the last place is 0.6 % of it), and of each weight matrix's gradient by its norm. On a CPU, BERT-large in bfloat16
# with GELU by another backend is 1.4 % off there, with attention 6 %; attention's gradient without its factor 1 / keep,
# or with one tile of 64 queries left out of 1196, is 13 % off (24 layers of 256).
LOSS_BOUND, GRADIENT_BOUND = 0.01, 0.10


def row(what: str, error: float, reference_error: float, bound: float, **facts) -> dict:
    """``passed`` is False for NaN."""
    return {"what": what, **facts, "error": error, "reference_error": reference_error, "bound": bound,
            "passed": error <= bound}  # fmt: skip


def summary(rows: list[dict], most: int = 5) -> dict:
    """What a results file keeps: how many were compared, the loss, and what is nearest to its bound or beyond."""

    def order(x: dict) -> tuple:
        known = x["bound"] and math.isfinite(x["error"])
        return x["what"] != "loss", -x["error"] / x["bound"] if known else -math.inf

    worst = sorted(rows, key=order)
    return {"passed": all(x["passed"] for x in rows), "compared": len(rows),
            "failed": sum(not x["passed"] for x in rows), "worst": worst[:most]}  # fmt: skip


def compare(config, batch: Batch, setting: Setting, *, name: str = "bert_fast",
            progress: Callable[[str], None] = lambda text: None) -> list[dict]:  # fmt: skip
    """Rows {"what", "error", "reference_error", "bound", "passed"} of our step ``name`` (with gradients in place, as it
    trains): the loss, then each parameter's gradient.

    ``config`` must have dropout 0. ``progress(text)`` says what is computed.
    """
    weights, bits16 = None, CONTENDERS[name].ours.weights == torch.bfloat16
    found = {}
    exact = replace(setting, dtype=torch.float32)
    for who, contender, asked in (("truth", "hf-eager", exact), ("reference", "hf-sdpa", setting),
                                  ("ours", name, setting)):  # fmt: skip
        progress(f"parity: {'the reference in float64' if who == 'truth' else contender}")
        built = build(contender, config, replace(asked, dtype=torch.float32) if bits16 else asked, weights=weights)
        if weights is None:
            if bits16:  # what all three have alike
                built.model.to(torch.bfloat16)
            weights = {key: value.cpu().clone() for key, value in built.model.state_dict().items()}
            built.model.double()
        elif who == "reference" and bits16:
            built.model.to(torch.bfloat16)
        elif who == "reference" and setting.dtype == torch.bfloat16:
            hidden_states_of_16_bits(built.model)
        found[who] = built.gradients(batch)
        del built
    # of a gradient that is next to nothing, errors over 0.1 % of the typical one
    gradients = [t for name, t in found["truth"].items() if name != "loss"]
    typical = math.sqrt(sum(float(t.square().sum()) for t in gradients) / sum(t.numel() for t in gradients))
    facts = {} if name == "bert_fast" else {"contender": name}
    return rows_of(
        found["truth"], found["reference"], found["ours"], FLOOR[setting.dtype], little=1e-3 * typical, **facts
    )


def hidden_states_of_16_bits(model: torch.nn.Module) -> None:
    """Has every LayerNorm of ``model`` give bfloat16."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, out: out.to(torch.bfloat16))


def rows_of(
    truth: dict, reference: dict, ours: dict, floor: float, *, factor: float = FACTOR, little: float = 0.0, **facts
) -> list[dict]:
    """The comparison of three dictionaries of tensors with the truth's names; ``facts`` go into each row."""
    rows = []
    for name, true in truth.items():
        if name not in ours:
            rows.append(row(name, math.inf, 0.0, floor, **facts))
            continue
        scale, allows = float(true.norm()), factor
        if name != "loss" and scale < (least := little * math.sqrt(true.numel())):
            scale, allows = least, NOTHING_FACTOR
        error, allowed = (float((found[name].double() - true).norm()) / (scale or 1.0) for found in (ours, reference))
        rows.append(row(name, error, allowed, allows * allowed + floor, **facts))
    return rows


def same_step(name: str, config, batch: Batch, setting: Setting) -> dict[str, float]:
    """By how much the loss and the worst weight matrix's gradient of a candidate differ from those of ours as built,
    with the same weights, batch and dropout. RuntimeError where it is more than rounding makes.

    The gradients' global norm would tell little: attention's could be a tenth off and move it by less than 1 %.
    """
    built, found = (build(one, config, setting).gradients(batch) for one in ("bert_fast", name))
    loss = float(built["loss"])
    off = {n: float((found[n] - g).norm() / g.norm()) for n, g in built.items() if n != "loss" and g.dim() > 1}
    worst = max(off, key=lambda n: (math.isnan(off[n]), off[n]))
    differs = {"loss": abs(float(found["loss"]) - loss) / loss, "gradient": off[worst]}
    if not (differs["loss"] <= LOSS_BOUND and differs["gradient"] <= GRADIENT_BOUND):
        raise RuntimeError(
            f"not the step of ours as built: the loss is off by {differs['loss']:.2%} (at most {LOSS_BOUND:.0%}), the "
            f"gradient of {worst} by {off[worst]:.2%} of its norm (at most {GRADIENT_BOUND:.0%})"
        )
    return differs


def operator_rows(operator: str, device: str, dtype: torch.dtype, *, model: str, seq: int, lengths: list[int],
                  contenders: Sequence[str] = ("bert_fast",)) -> list[dict]:  # fmt: skip
    """Rows of an operator alone, dropout on: its output and every gradient, ours and each candidate's, beside PyTorch's
    operations in ``dtype`` against those in float64 with the same masks; and whether a second run has equal bits."""
    options = {"model": model, "seq": seq, "lengths": lengths}
    case = build_case(operator, device, dtype, parameters=dtype, **options)
    exact = build_case(operator, device, torch.float64, parameters=torch.float64, **options)
    with torch.no_grad():
        for target, source in zip(exact.inputs, case.inputs, strict=True):
            target.copy_(source)
    draw = torch.Generator(device).manual_seed(1)
    grad_out = torch.randn(case.ours().shape, generator=draw, device=device).to(dtype)

    def results(case) -> dict[str, Tensor]:
        out = case.ours()
        found = [out.detach(), *torch.autograd.grad(out, case.inputs, grad_out.to(out.dtype))]
        return {f"{operator}, {f'gradient {n}' if n else 'output'}": tensor for n, tensor in enumerate(found)}

    rows = []
    with dispatch.use_backend(**{operator: "reference"}):
        truth, reference = results(exact), results(case)
    for name in contenders:
        with choice.use(CONTENDERS[name].ours.choices):
            found, again = results(case), results(case)
        rows += rows_of(truth, reference, found, FLOOR[dtype], contender=name)
        if not all(torch.equal(found[what], again[what]) for what in truth):
            rows.append(row(f"{operator}: equal bits twice", math.inf, 0.0, 0.0, contender=name))
    return rows


def _encoding(built: Built, batch: Batch) -> dict[str, Tensor]:
    """What a contender gives for the batch's real tokens, one after the other, and for its sequences."""
    outputs = built.encode(batch)
    states = outputs.last_hidden_state
    real = states[0, : batch.real_tokens] if built.ours else states[batch.padded["attention_mask"] != 0]
    return {"last_hidden_state": real.double().cpu(), "pooler_output": outputs.pooler_output.double().cpu()}


def compare_encodings(
    config, batch: Batch, setting: Setting, peers: list[str], *, progress: Callable[[str], None] = lambda text: None
) -> tuple[list[dict], dict[str, str]]:
    """Rows as :func:`compare` has them, of the outputs of ours and of each of ``peers``; and why a peer cannot run.

    The reference is transformers with eager attention; ``peers`` are those of other libraries.
    """
    progress("parity: the reference in float64")
    exact = build("hf-eager", config, replace(setting, dtype=torch.float32))
    weights = {key: value.cpu().clone() for key, value in exact.model.state_dict().items()}
    exact.model.double()
    truth = _encoding(exact, batch)
    del exact
    found, failed = {}, {}
    for name in ("hf-eager", "bert_fast", *peers):
        progress(f"parity: {name}")
        try:
            found[name] = _encoding(build(name, config, setting, weights=weights), batch)
        except Exception as error:
            if name in ("hf-eager", "bert_fast"):
                raise
            failed[name] = reason(error)  # the others still run
    rows, reference = [], found.pop("hf-eager")
    for name, outputs in found.items():
        factor = FACTOR if name == "bert_fast" else PEER_FACTOR
        rows += rows_of(truth, reference, outputs, FLOOR[setting.dtype], factor=factor, contender=name)
    for x in (x for x in rows if x["contender"].endswith("int8")):
        x |= {"bound": INT8_BOUND, "passed": x["error"] <= INT8_BOUND}
    return rows, failed


def gate(
    model: str, batch: Batch, setting: Setting, peers: list[str], progress: Callable[[str], None]
) -> tuple[list[dict], dict[str, str]]:
    """The rows of all that is ours, and of other libraries' encoders; and of each of ``peers`` that cannot run, or is
    wrong, why it is not to be timed: its rows are left out."""
    config, rows, failed = model_config(model, dropout=0.0), [], {}
    if setting.train:
        for name in ["bert_fast", *(peer for peer in peers if peer.startswith("bert_fast"))]:
            rows += compare(config, batch, setting, name=name, progress=progress)
    else:
        others = [peer for peer in peers if not peer.startswith("hf-")]
        rows, failed = compare_encodings(config, batch, setting, others, progress=progress)
    for x in rows:
        if not x["passed"] and (name := x.get("contender", "bert_fast")) != "bert_fast":
            failed.setdefault(name, f"its {x['what']} is off by {x['error']:.2e}: it is not timed")
    return [x for x in rows if x.get("contender") not in failed], failed
