"""Phase 3: every operator against its limit, forward and backward apart, beside PyTorch's and the peers'."""

import statistics
import time
from collections.abc import Callable

import gpu_feed_forward
import torch
import torch.nn.functional as F
from gpu_aims import PRODUCTS
from gpu_results import Results
from gpu_tune import HOPPER, KERNELS, applied, configurations, same
from operators import DIRECTIONS, DROPOUT, OPERATORS, Case, Stopwatch, Work, build_case
from step_model import TOKENS, ceilings_of, lengths_of, operator_seconds, parameters, update
from workload import model_config

import bert_fast
from bert_fast import dispatch

REPEAT = 20
# attention's on compute capability 9.0, by direction
CANDIDATES = {direction: kernel for kernel, direction in KERNELS["attention"] if kernel in HOPPER}
SECONDS_OF_A_CASE = 4  # with compilation; a case is not begun with less time left
# FLOPs an element of the operators whose limit is memory, roughly: where they lie in a roofline picture
FLOPS_OF_AN_ELEMENT = {"embedding_layernorm": 12, "residual_layernorm": 12, "bias_gelu": 40, "mlm_loss": 1}


def sizes(options) -> list[tuple[str, int, str]]:
    """(model, length of a full sequence, lengths), the most telling first."""
    if options.smoke:
        return [("micro", 24, "wikipedia")]
    return [
        (model, seq, kind) for seq in (512, 128) for kind in ("full", "wikipedia") for model in ("large", "base")
    ]  # fmt: skip


def contenders(operator: str, direction: str) -> list[str]:
    """Who has ``operator`` here: ours, PyTorch's own composition, installed peers, a candidate to become ours; of
    mlm_loss the products that are in it too."""
    peers = [b for b in ("flash_attn", "apex") if b in dispatch.TABLE[operator] and dispatch.why_unavailable(b) is None]
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    candidates = [CANDIDATES[direction]] if hopper and operator == "attention" else []
    alone = [PRODUCTS] if (operator, direction) == ("mlm_loss", "forward") else []
    return ["bert_fast", "pytorch", *peers, *candidates, *alone]


def products_of_mlm_loss(case: Case) -> Callable[[], object]:
    """The three products of mlm_loss, for all positions at once and the vocabulary padded as it pads it."""
    hidden, word, _ = (x.detach() for x in case.inputs)
    word = F.pad(word.to(hidden.dtype), (0, 0, 0, -word.shape[0] % 128))
    logits = hidden @ word.T
    return lambda: (hidden @ word.T, logits @ word, logits.T @ hidden)


def candidate(direction: str, call: Callable[[], object]) -> Callable[[], object]:
    """Attention's ``call`` by its candidate for that direction. What is wrong is not timed: RuntimeError where it does
    not give, to rounding, what the portable kernels give."""
    name = CANDIDATES[direction]
    (change,) = configurations("attention", name, smoke=False)

    def run():
        with applied("attention", name, change):
            return call()

    with applied("attention", name, {table: {} for table in change}):
        expected = call()
    if not same(run(), expected):
        raise RuntimeError(f"attention's {direction}, {name}, does not give what the portable kernels give")
    return run


def calls(case: Case, direction: str, contender: str, operator: str) -> Callable[[], object]:
    """A function that runs one direction of one contender."""
    if contender in ("flash_attn", "apex"):

        def with_peer(call: Callable[[], object]) -> Callable[[], object]:
            def run():
                with dispatch.use_backend(**{operator: contender}):
                    return call()

            return run

        forward = with_peer(case.ours)
        return forward if direction == "forward" else with_peer(case.backward("bert_fast", forward()))
    if contender == CANDIDATES[direction]:
        return candidate(direction, case.ours if direction == "forward" else case.backward("bert_fast", case.ours()))
    if contender == PRODUCTS:
        return products_of_mlm_loss(case)
    forward = {"bert_fast": case.ours, "pytorch": case.torch, "compile": None}[contender]
    if contender == "compile":
        forward = torch.compile(case.torch, dynamic=False)
    side = "bert_fast" if contender == "bert_fast" else "pytorch"
    return forward if direction == "forward" else case.backward(side, forward())


def rate_of(work, ms: float, limits: dict) -> dict:
    """FLOP/s or bytes/s by what limits the operator, and its share of the measured limit."""
    if work.flops:
        rate, limit = {"tflops": work.flops / ms / 1e9}, limits.get("matmul_tflops", {}).get("bfloat16")
    else:
        rate, limit = {"gbs": work.bytes / ms / 1e6}, limits.get("copy_gbs")
    value = next(iter(rate.values()))
    return rate | {"share_of_limit": value / limit if limit else float("nan")}


def times(call: Callable[[], object], stopwatch: Stopwatch, repeat: int) -> dict:
    for _ in range(min(2, repeat)):
        stopwatch(call)
    measured = sorted(stopwatch(call) for _ in range(repeat))
    return {
        "ms": statistics.median(measured),
        "p20_ms": measured[len(measured) // 5],
        "p80_ms": measured[-1 - len(measured) // 5],
    }


def measure(operator, direction, contender, model, seq, kind, dropout, options, stopwatch, results) -> dict:
    config = model_config(model, dropout=dropout)
    lengths = lengths_of(kind, seq, 32 if options.smoke else TOKENS)
    dtype = torch.float32 if options.smoke else torch.bfloat16  # Triton's interpreter is slow in 16 bits
    case = build_case(
        operator, options.device, dtype, model=model, seq=seq, lengths=lengths, dropout=dropout, parameters=dtype
    )
    found = times(calls(case, direction, contender, operator), stopwatch, 1 if options.smoke else REPEAT)
    work = case.work[direction]
    elements = sum(lengths) * (config.intermediate_size if operator == "bias_gelu" else config.hidden_size)
    row = found | rate_of(work, found["ms"], results.data.get("limits", {}))
    row |= {"shape": case.shape, "backend": case.backend if contender == "bert_fast" else contender}
    row["flops"] = work.flops or FLOPS_OF_AN_ELEMENT.get(operator, 1) * elements
    row["bytes"] = work.bytes or (4 if direction == "forward" else 8) * elements * dtype.itemsize
    if contender == "bert_fast":
        seconds = operator_seconds(config, lengths, operator, direction, ceilings_of(results.data))
        row["predicted_ms"] = 1e3 * seconds
    return row


def optimizer_step(model: str, name: str, device: str):
    """(a step over BERT's parameters with 16-bit gradients, FLOPs 0 and bytes) of an optimiser, ours or a peer's."""
    with torch.device(device):
        module = bert_fast.BertForPreTraining(model_config(model, dropout=0.0)).to(torch.bfloat16)
    for p in module.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    if name in ("adamw", "lamb"):
        from bert_fast import optim

        groups = optim.parameter_groups(module, weight_decay=0.01)
        optimizer = {"adamw": optim.AdamW, "lamb": optim.Lamb}[name](groups, lr=1e-4, max_grad_norm=1.0)
    elif name == "apex FusedLAMB":
        from apex.optimizers import FusedLAMB

        optimizer = FusedLAMB(module.parameters(), lr=1e-4)
    else:  # moments in 16 bits and no float32 weights: it moves less than half of ours
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=device == "cuda")
    return optimizer.step


def measure_optimizer(model: str, name: str, options, stopwatch, results) -> dict:
    config = model_config(model, dropout=0.0)
    found = times(optimizer_step(model, name, options.device), stopwatch, 1 if options.smoke else REPEAT)
    lines = update(config, "bfloat16", name if name in ("adamw", "lamb") else "adamw")
    moved = int(sum(line.bytes for line in lines)) if name in ("adamw", "lamb") else 12 * parameters(config)
    limit = results.data.get("limits", {}).get("copy_gbs")
    gbs = moved / found["ms"] / 1e6
    row = found | {
        "gbs": gbs,
        "share_of_limit": gbs / limit if limit else float("nan"),
        "shape": f"{parameters(config)} parameters",
    }
    row |= {"flops": 12 * parameters(config), "bytes": moved, "backend": name}
    if name in ("adamw", "lamb"):
        row["predicted_ms"] = 1e3 * sum(line.seconds(ceilings_of(results.data)) for line in lines)
    return row


def run(results: Results, options) -> None:
    """Fills "operators": a row for each operator, direction, size and contender."""
    if options.smoke and dispatch.why_unavailable("triton") is None:
        dispatch.set_backend("triton")  # under Triton's interpreter: the launchers that a GPU would run
    stopwatch = Stopwatch(options.device)
    work = []
    for size in sizes(options):
        for operator in OPERATORS:
            dropouts = (DROPOUT, 0.0) if operator == "attention" else (DROPOUT,)
            for dropout in dropouts:
                work += [(operator, d, c, *size, dropout) for d in DIRECTIONS for c in contenders(operator, d)]
    compiled = [] if options.smoke else [
        (operator, d, "compile", model, 512, "full", DROPOUT)
        for model in ("large", "base") for operator in OPERATORS for d in DIRECTIONS
    ]  # fmt: skip
    at_512 = sum(case[4] == 512 for case in work)
    for number, (operator, direction, contender, *size, dropout) in enumerate(
        [*work[:at_512], *compiled, *work[at_512:]]
    ):
        if time.time() > options.until - SECONDS_OF_A_CASE:
            results.put("operators_left_out", len(work) + len(compiled) - number)
            print("   the time is up: the rest is left out", flush=True)
            return
        if number == at_512 or (options.smoke and number == 0):
            optimizers(results, options, stopwatch)
        if number == 0:
            feed_forward(results, options, stopwatch)
        facts = dict(zip(("model", "seq", "lengths"), size, strict=True))
        facts |= {"operator": operator, "direction": direction, "contender": contender, "dropout": dropout}
        results.case(
            3, "/".join(map(str, facts.values())), "operators", facts,
            lambda o=operator, d=direction, c=contender, s=tuple(size), p=dropout: measure(
                o, d, c, *s, p, options, stopwatch, results
            ),
        )  # fmt: skip


def optimizers(results: Results, options, stopwatch) -> None:
    for model in ("micro",) if options.smoke else ("large", "base"):
        for name in ("lamb", "adamw", "torch AdamW, fused", "apex FusedLAMB"):
            if name == "apex FusedLAMB" and dispatch.why_unavailable("apex") is not None:
                continue
            facts = {"model": model, "seq": 0, "lengths": "", "operator": name, "direction": "update", "dropout": 0.0}
            facts["contender"] = "bert_fast" if name in ("adamw", "lamb") else name
            results.case(
                3, f"{model}/{name}", "operators", facts,
                lambda m=model, n=name: measure_optimizer(m, n, options, stopwatch, results),
            )  # fmt: skip


def measure_feed_forward(model: str, direction: str, contender: str, options, stopwatch, results) -> dict:
    """One direction of a contender of gpu_feed_forward.py. What is wrong is not timed: RuntimeError where the kernel
    does not give, to rounding, what a product and bias_gelu give."""
    config, tokens = model_config(model, dropout=0.0), 32 if options.smoke else TOKENS
    dtype = torch.float32 if options.smoke else torch.bfloat16
    calls = gpu_feed_forward.calls(config, tokens, dtype, options.device, direction)
    if contender == "epilogue" and not same(calls[contender](), calls["bert_fast"]()):
        raise RuntimeError("GELU in the epilogue does not give what a product and bias_gelu give")
    found = times(calls[contender], stopwatch, 1 if options.smoke else REPEAT)
    counted = gpu_feed_forward.work(config, tokens, direction, contender, dtype.itemsize)
    row = found | counted | rate_of(Work(flops=counted["flops"]), found["ms"], results.data.get("limits", {}))
    row |= {"shape": f"{tokens} x {config.hidden_size} x {config.intermediate_size}", "backend": contender}
    if contender == "bert_fast":
        row["predicted_ms"] = gpu_feed_forward.predicted_ms(config, tokens, direction, ceilings_of(results.data))
    return row


def feed_forward(results: Results, options, stopwatch) -> None:
    """Of the feed-forward a product and GELU, apart and in one kernel (gpu_feed_forward.py)."""
    contenders = [c for c in gpu_feed_forward.CONTENDERS if c != "epilogue" or gpu_feed_forward.available()]
    for model in ("micro",) if options.smoke else ("large", "base"):
        for direction in DIRECTIONS:
            for contender in contenders:
                if time.time() > options.until - SECONDS_OF_A_CASE:
                    return
                facts = {"model": model, "seq": 0, "lengths": "", "operator": "feed_forward"}
                facts |= {"direction": direction, "contender": contender, "dropout": 0.0}
                results.case(
                    3, f"{model}/feed_forward/{direction}/{contender}", "operators", facts,
                    lambda m=model, d=direction, c=contender: measure_feed_forward(
                        m, d, c, options, stopwatch, results
                    ),
                )  # fmt: skip
