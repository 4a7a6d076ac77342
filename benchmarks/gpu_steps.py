"""Phase 4: whole training steps, ours (eager and captured) against the reference's variants, and their loss curves.

Ours also with the kernels that are candidates to become the default, and by kernel, as the profiler sees them.
"""

import contextlib
import gc
import importlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import variants
from gpu_aims import OURS as CAPTURED
from gpu_aims import REFERENCES, SMALL
from gpu_results import Results
from measure import PeakMemory, quantiles, synchronize
from operators import masked_positions
from step_aims import asynchronous_forward, five_products, gelu_in_products
from step_model import TOKENS, Entry, ceilings_of, lengths_of, predict, step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workload import Batch, Workload, model_config, random_batch

import bert_fast
from bert_fast.data import PretrainingDataset, capacities, pack_samples, pad_samples, special_ids
from bert_fast.flops import step_flops
from bert_fast.linear import gradients_in_place
from bert_fast.train.captured import Recorder
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Outcome, Step

DROPOUT = 0.1
SECONDS_OF_TIMING = 3
MOST_STEPS, FEWEST_STEPS = 20, 4
SECONDS_OF_A_CASE = {"hf-compile": 75}  # a case is not begun with less time left
SECONDS_OF_OTHERS = 12
CURVE_STEPS = 200
# By how much a candidate's step may differ from ours as built: of the loss (in bfloat16 a unit in the last place is
# 0.6 % of it), and of each weight matrix's gradient by its norm. On a CPU, BERT-large in bfloat16 with GELU by another
# backend is 1.4 % off there, with attention 6 %; attention's gradient without its factor 1 / keep, or with one tile of
# 64 queries left out of 1196, is 13 % off (24 layers of 256).
LOSS_BOUND, GRADIENT_BOUND = 0.01, 0.10


@dataclass(frozen=True)
class Candidate:
    """Kernels that nothing uses until a table names the GPU: ``functions`` of the module ``kernels``, for compute
    ``capabilities``. ``asks(capability)`` is what the ``table`` (a module and a name in it) says where they are used
    everywhere, ``change`` what the step model has for them."""

    capabilities: tuple[int, ...]
    table: tuple[str, str]
    asks: Callable[[int], dict]
    kernels: str
    functions: tuple[str, ...]
    change: Callable[[Entry], Entry]


CANDIDATES = {
    "one-pass attention": Candidate(
        (90,), ("bert_fast.kernels.attention", "ONE_PASS_BACKWARD"), lambda capability: {capability: 1},
        "bert_fast.kernels.attention_hopper", ("attention_bwd",), five_products,
    ),
    "asynchronous attention": Candidate(
        (90,), ("bert_fast.kernels.attention", "ASYNCHRONOUS_FORWARD"), lambda capability: {capability: 1},
        "bert_fast.kernels.attention_hopper", ("attention_fwd",), asynchronous_forward,
    ),
    "GELU in the epilogue": Candidate(
        (90, 100), ("bert_fast.dispatch", "FEED_FORWARD_EPILOGUE"),
        lambda capability: {"fwd": {capability: 1}, "bwd": {capability: 1}},
        "bert_fast.kernels.feed_forward", ("product_gelu", "product_gelu_bwd"), gelu_in_products,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How a step is run: ``weights`` are the parameters' dtype, under bfloat16 autocast where float32; with
    ``candidates`` (names of CANDIDATES) in use. A ``profiled`` one is not timed: its kernels are."""

    name: str
    weights: str
    optimizer: str
    captured: bool = False
    candidates: tuple[str, ...] = ()
    profiled: bool = False


OURS = (
    Variant(CAPTURED, "bfloat16", "lamb", True),
    Variant("bert_fast eager", "bfloat16", "lamb"),
    Variant("bert_fast captured, autocast", "float32", "adamw", True),
)
PROFILED = Variant(f"{CAPTURED}, profiled", "bfloat16", "lamb", True, profiled=True)
WITH_CANDIDATES = (
    *(Variant(f"bert_fast, {name}", "bfloat16", "lamb", True, (name,)) for name in CANDIDATES),
    Variant("bert_fast, all candidates", "bfloat16", "lamb", True, tuple(CANDIDATES)),
)
# The reference gets the fastest AdamW of PyTorch, one pass where LAMB takes two: the comparison leans its way.
SDPA, EAGER, MASKED_HEAD, COMPILED = THEIRS = tuple(
    Variant(name, "float32", "torch AdamW, fused") for name in REFERENCES
)


def cases(options) -> list[tuple[Variant, str, int, str]]:
    """(variant, model, length of a full sequence, lengths) in the order of what is to be known first."""
    if options.smoke:
        timed = (*OURS, *THEIRS[:-1])
        order = [(v, "micro", 24, kind) for kind in ("wikipedia", "full") for v in timed]
        order += [(v, "micro", 24, "full") for v in (PROFILED, *WITH_CANDIDATES)]
        return [*order, (OURS[0], "micro", 24, SMALL)]
    large, base = ([(model, 512, kind) for kind in ("wikipedia", "full")] for model in ("large", "base"))
    at_512 = large + base
    at_128 = [(m, 128, kind) for m in ("base", "large") for kind in ("full", "wikipedia")]
    order = [(OURS[0], *size) for size in large]
    order += [(PROFILED, "large", 512, "full")]
    order += [(v, "large", 512, kind) for kind in ("full", "wikipedia") for v in WITH_CANDIDATES]
    order += [(OURS[0], *size) for size in (*base, at_128[0])]
    order += [(v, *size) for v in (SDPA, OURS[1]) for size in at_512]
    order += [(v, "base", 128, SMALL) for v in OURS[:2]] + [(PROFILED, *at_128[0])]
    # a minute each; until then the factor over the best reference is open
    order += [(COMPILED, m, 512, kind) for kind in ("full", "wikipedia") for m in ("large", "base")]
    order += [(v, *size) for v in (MASKED_HEAD, EAGER, OURS[2]) for size in at_512]
    order += [(v, *size) for size in at_128 for v in (*OURS, *THEIRS[:-1])]
    order += [(COMPILED, *size) for size in at_128]
    return list(dict.fromkeys(order))


def autocast(device: str, weights: str, smoke: bool):
    """Products in bfloat16 whatever the weights; a trial on a CPU stays in float32, which is faster there."""
    if smoke or weights == "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def trainer(model, optimizer, batch: Batch, *, products: bool, capture: bool) -> Callable[..., Outcome]:
    """What `bert-fast pretrain` trains with, as ``train(batch, rate, seed)``, for batches of the shapes of ``batch``.

    ``products`` multiplies in bfloat16 under autocast. What is called captured is: raises RuntimeError where recording
    fails, torch.OutOfMemoryError where that was for want of memory.
    """

    def packed(batch: Batch) -> dict:
        return {**batch.packed, "max_length_q": batch.seq}

    def refuse(reason: str) -> None:
        error = sys.exc_info()[1]
        raise error if isinstance(error, torch.OutOfMemoryError) else RuntimeError(reason)

    recorder = Recorder(model.parameters()) if capture else None
    ranks = Ranks(0, 1, next(model.parameters()).device)
    step = Step(model, optimizer, ranks, bf16=products, recorder=recorder, tell=refuse)
    step.prepare([packed(batch)])

    def train(batch: Batch, rate: float, seed: int) -> Outcome:
        return step([packed(batch)], seed=seed, lr=rate, predicted=batch.predicted, sequences=len(batch.lengths))

    return train


def our_model(variant: Variant, config, options) -> bert_fast.BertForPreTraining:
    """The same weights whenever it is called."""
    torch.manual_seed(0)
    kind = torch.float32 if options.smoke or variant.weights == "float32" else torch.bfloat16
    with torch.device(options.device):
        return bert_fast.BertForPreTraining(config).to(kind).train()


def our_step(variant: Variant, config, batch: Batch, options) -> Callable[[], Outcome]:
    """A function that trains one step of ours."""
    from bert_fast import optim

    model = our_model(variant, config, options)
    groups = optim.parameter_groups(model, weight_decay=0.01)
    optimizer = {"adamw": optim.AdamW, "lamb": optim.Lamb}[variant.optimizer](groups, lr=1e-4, max_grad_norm=1.0)
    train = trainer(
        model, optimizer, batch, products=not options.smoke and variant.weights == "float32",
        capture=variant.captured and options.device == "cuda",
    )  # fmt: skip
    seeds = itertools.count()
    return lambda: train(batch, 1e-4, next(seeds))


def their_step(variant: Variant, config, batch: Batch, options) -> Callable[[], torch.Tensor]:
    """A function that trains one step of a reference variant on the padded batch and returns its loss."""
    built = variants.build(variant.name, config, options.device, train=True, nsp=True, padding="padded")
    inputs = built.batch_of(batch)
    parameters = [p for p in built.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=options.device == "cuda")

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(options.device, variant.weights, options.smoke):
            loss = built.loss(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    return run


def timed_steps(run: Callable[[], object], device: str, smoke: bool) -> list[float]:
    """Seconds of each of several steps, by the device's clock where it has one."""
    run()
    if device != "cuda":
        times = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    run()
    torch.cuda.synchronize()
    marks, begun = [torch.cuda.Event(enable_timing=True)], time.perf_counter()
    marks[0].record()
    while len(marks) <= MOST_STEPS and (len(marks) <= FEWEST_STEPS or time.perf_counter() - begun < SECONDS_OF_TIMING):
        run()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        # of the step before: the time above is the device's, and it has its next step when it is done with one
        marks[-2].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def capability(device: str) -> int | None:
    """The compute capability, 10 times the major number plus the minor one; None of a CPU."""
    if device != "cuda":
        return None
    from bert_fast.kernels import rows

    return rows.capability(torch.device(device))


def why_left_out(variant: Variant, device: str) -> str | None:
    """Why the candidates of ``variant`` cannot run here, or None where they can."""
    here = capability(device)
    for name in variant.candidates:
        known = CANDIDATES[name].capabilities
        if here not in known:
            this = "this is a CPU" if here is None else f"this GPU has {here / 10}"
            return f"{name} is for compute capability {' and '.join(str(c / 10) for c in known)}, and {this}"
    return None


@contextlib.contextmanager
def in_use(names: tuple[str, ...], device: str) -> Iterator[dict[str, int]]:
    """The candidates ``names`` in place of the defaults, for the length of a ``with`` block; gives how often each of
    their functions has been called so far."""
    called: dict[str, int] = {}

    def counted(name: str, function: Callable) -> Callable:
        called[name] = 0

        def call(*arguments, **options):
            called[name] += 1
            return function(*arguments, **options)

        return call

    with contextlib.ExitStack() as stack:
        for candidate in (CANDIDATES[name] for name in names):
            module, table = candidate.table
            asked = candidate.asks(capability(device))
            stack.enter_context(mock.patch.object(importlib.import_module(module), table, asked))
            kernels = importlib.import_module(candidate.kernels)
            for function in candidate.functions:
                call = counted(function, getattr(kernels, function))
                stack.enter_context(mock.patch.object(kernels, function, call))
        yield called


def require_called(called: dict[str, int]) -> None:
    """RuntimeError where a function of a candidate in use has not run: what was measured is another step then."""
    if silent := [name for name, count in called.items() if not count]:
        raise RuntimeError(f"not used by the step, though asked for: {', '.join(silent)}")


def gradients(model: bert_fast.BertForPreTraining, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of ``batch`` and the gradient of every weight matrix, with the same dropout whenever it is called."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with gradients_in_place(model.parameters()):
        loss = model(**{**batch.packed, "max_length_q": batch.seq}).loss
        loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.dim() > 1}


def checked(variant: Variant, config, batch: Batch, options) -> dict[str, float]:
    """By how much the loss and the gradients of ``variant`` differ from those of ours as built: the same weights, batch
    and dropout. RuntimeError where it is more than rounding makes.

    The gradients' global norm would tell little: attention's could be a tenth off and move it by less than 1 %.
    """
    model = our_model(variant, config, options)
    loss, built = gradients(model, batch)
    with in_use(variant.candidates, options.device) as called:
        found_loss, found = gradients(model, batch)
    require_called(called)
    off = {name: float((found[name].float() - g.float()).norm() / g.float().norm()) for name, g in built.items()}
    worst = max(off, key=lambda name: (math.isnan(off[name]), off[name]))
    differs = {"loss": abs(found_loss - loss) / loss, "gradient": off[worst]}
    if not (differs["loss"] <= LOSS_BOUND and differs["gradient"] <= GRADIENT_BOUND):
        raise RuntimeError(
            f"not the step of ours as built: the loss is off by {differs['loss']:.2%} (at most {LOSS_BOUND:.0%}), the "
            f"gradient of {worst} by {off[worst]:.2%} of its norm (at most {GRADIENT_BOUND:.0%})"
        )
    return differs


def measure(variant: Variant, model: str, seq: int, kind: str, options, results: Results) -> dict:
    """One row. A batch that does not fit the memory is halved; rates are per second, so they still compare."""
    config = model_config(model, dropout=DROPOUT)
    lengths = [seq] * 8 if kind == SMALL else lengths_of(kind, seq, 96 if options.smoke else TOKENS)
    while True:
        try:
            if variant.profiled:
                return profile_batch(variant, config, seq, lengths, options)
            return measure_batch(variant, config, seq, lengths, options, results, kernels=kind == SMALL)
        except torch.OutOfMemoryError:
            if len(lengths) < 2:
                raise
            lengths = lengths[::2]  # of sorted quantiles every other one: the same distribution
        release()


def release() -> None:
    """Give everything of the last case back."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kernels_of(run: Callable[[], object], device: str, steps: int = 5) -> list[dict]:
    """The kernels and copies of a step by name, those that take longest in all first: "kernel", "calls" and "us" of a
    step. Of a CPU, which has none, PyTorch's operators, each without those that it calls."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        synchronize(device)
    lines: dict[str, dict] = {}
    for event in profiler.events():
        if device == "cuda" and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        line = lines.setdefault(event.name, {"kernel": event.name, "calls": 0, "us": 0.0})
        line["calls"] += 1
        line["us"] += event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
    found = [{"kernel": x["kernel"], "calls": x["calls"] / steps, "us": x["us"] / steps} for x in lines.values()]
    return sorted(found, key=lambda line: -line["us"])


def batch_of(lengths: list[int], seq: int, config, options) -> Batch:
    predicted = masked_positions(lengths)
    return random_batch(lengths, predicted, seq, options.device, nsp=True, vocabulary=config.vocab_size)


def profile_batch(variant: Variant, config, seq: int, lengths: list[int], options) -> dict:
    """A row of "profiles": a case of its own, so that ours has its times whatever becomes of the profiler."""
    run = our_step(variant, config, batch_of(lengths, seq, config, options), options)
    run()  # it is recorded
    kernels = kernels_of(run, options.device)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    return {"sequences": len(lengths), "kernels_ms": sum(x["us"] for x in kernels) / 1e3, "kernels": kernels}


def measure_batch(
    variant: Variant, config, seq: int, lengths: list[int], options, results: Results, *, kernels: bool
) -> dict:
    ours = variant.name.startswith("bert_fast")
    batch, predicted = batch_of(lengths, seq, config, options), masked_positions(lengths)
    differs = checked(variant, config, batch, options) if variant.candidates else None
    release()
    with in_use(variant.candidates, options.device) as called:
        with PeakMemory(options.device) as peak:
            run = (our_step if ours else their_step)(variant, config, batch, options)
            # Preparing ours is no part of a step: its second rehearsal runs a forward beside all gradients that the
            # first has left.
            peak.reset()
            first = run()
            loss = float(first.scalars[:2].sum() if ours else first)
            run()  # the first backward had no optimiser's state beside it, unless a rehearsal made that
        require_called(called)
        times = timed_steps(run, options.device, options.smoke)
        alone = sum(line["us"] for line in kernels_of(run, options.device)) if kernels else 0.0
    del run
    release()
    limit = results.data.get("limits", {}).get("matmul_tflops", {}).get("bfloat16", float("nan")) * 1e12
    seconds = statistics.median(times)
    full = step_flops(config, lengths, predicted, train=True)
    computed = lengths if ours else [seq] * len(lengths)
    executed = step_flops(
        config, computed, predicted if ours or variant.name == "hf-masked-head" else sum(computed), train=True,
        read=predicted + len(lengths) if ours else None,  # the last layer at masked positions and [CLS]
    )  # fmt: skip
    row = {
        "sequences": len(lengths), "real_tokens": sum(lengths), "predicted": predicted,
        "ms": {name: 1e3 * value for name, value in quantiles(times).items()},
        "steps_timed": len(times), "loss": loss,
        "sequences_per_s": len(lengths) / seconds, "real_tokens_per_s": sum(lengths) / seconds,
        "mfu": full / seconds / limit, "executed_share": executed / seconds / limit,
        "peak_memory_mib": peak.mib,
    }  # fmt: skip
    if alone:
        row["kernels_ms"] = alone / 1e3
    if differs:
        row["differs"] = differs
    if ours:
        ceilings, lines = ceilings_of(results.data), step(config, lengths, variant.weights, variant.optimizer)
        for name in variant.candidates:
            lines = [CANDIDATES[name].change(line) for line in lines]
        expected = predict(config, lengths, lines, ceilings)
        host = 0.0 if variant.captured else expected.launches * ceilings.launch
        row["predicted_ms"] = 1e3 * max(expected.seconds, host)
    return row


def leave_out(results: Results, what: str) -> None:
    """There is no time left for it; told once, whichever process finds that out."""
    if what not in results.data.get("steps_left_out", []):
        results.add("steps_left_out", what)


def run(results: Results, options) -> None:
    """Fills "steps", "profiles" and "curves"; "candidates_left_out" says why of those that cannot run here."""
    order = cases(options)
    reasons = {v.name: why_left_out(v, options.device) for v in WITH_CANDIDATES}
    reasons = {name: why for name, why in reasons.items() if why}
    results.put("candidates_left_out", reasons)
    # what can be told of the reference in a minute comes before what takes it a minute
    before = next((number for number, case in enumerate(order) if case[0] == COMPILED), len(order) - 1)
    for number, (variant, model, seq, kind) in enumerate(order):
        if number == before:
            curves(results, options)
        key = f"{model} {seq} {kind}, {variant.name}"
        if variant.name in reasons or key in results.begun(4):
            continue
        if time.time() > options.until - SECONDS_OF_A_CASE.get(variant.name, SECONDS_OF_OTHERS):
            leave_out(results, f"{model} {seq} {kind} {variant.name}")
            continue
        facts = {"model": model, "seq": seq, "lengths": kind, "variant": variant.name, "weights": variant.weights,
                 "optimizer": variant.optimizer}  # fmt: skip
        results.case(
            4, key, "profiles" if variant.profiled else "steps", facts,
            lambda v=variant, m=model, s=seq, k=kind: measure(v, m, s, k, options, results),
        )  # fmt: skip
        release()


# --------------------------------------------------------------------------------------------------------------
# Loss curves


def curve_batches(count: int, sequences: int, seq: int) -> tuple[list[Batch], int]:
    """``count`` batches of real text, the Python language reference, padded and packed to the same capacities."""
    from pydoc_data.topics import topics

    documents = [[line for line in text.splitlines() if line.strip()] for _, text in sorted(topics.items())]
    work = Workload(documents=[document for document in documents if document])
    dataset = PretrainingDataset(work.corpus, work.tokenizer, max_length=seq, seed=0, nsp=True)
    pad, size = special_ids(work.tokenizer).pad, capacities(sequences * seq, seq, sequences)
    batches: list[Batch] = []
    order: list[int] = []
    while len(batches) < count:
        if len(order) < sequences:
            dataset.set_epoch(dataset.epoch + 1)
            order = dataset.order().tolist()
        samples = [dataset[i] for i in order[:sequences]]
        order = order[sequences:]
        lengths = [len(sample.input_ids) for sample in samples]
        padded = pad_samples(samples, pad_id=pad, length=seq)
        packed = pack_samples(samples, size, pad_id=pad)
        batches.append(Batch(lengths, sum(len(s.masked_positions) for s in samples), seq, padded, padded, packed))
    return batches, work.tokenizer.get_vocab_size()


def curves(results: Results, options) -> None:
    """200 steps of ours and of the reference: same weights, batches and schedule, each with masks of its own."""
    model, sequences, seq, count = ("micro", 4, 32, 4) if options.smoke else ("base", 64, 128, CURVE_STEPS)
    made: list = []
    for name in ("bert_fast", "transformers"):
        key = f"loss curve, {name}"
        if key in results.begun(4):
            continue
        if time.time() > options.until - SECONDS_OF_OTHERS and not options.smoke:
            leave_out(results, f"loss curve of {name}")
            continue

        def measure(name=name) -> dict:
            if not made:
                made.append(curve_batches(count, sequences, seq)[0])
            return {"losses": curve(name, model, made[0], options)}

        facts = {"variant": name, "model": model, "seq": seq, "sequences": sequences}
        results.case(4, key, "curves", facts, measure)
        release()


def curve(name: str, model: str, batches: list[Batch], options) -> list[float]:
    """The loss of every step under AdamW with a linear warm-up, bfloat16 autocast, float32 weights."""
    import transformers

    from bert_fast import optim

    config = model_config(model, dropout=DROPOUT)
    config.vocab_size = max(config.vocab_size, 30522)
    torch.manual_seed(0)
    reference = transformers.BertForPreTraining(config).to(options.device).train()
    ours = name == "bert_fast"
    if ours:
        module = bert_fast.BertForPreTraining(config).to(options.device).train()
        module.load_state_dict(reference.state_dict())
        reference = module
    optimizer = optim.AdamW(
        optim.parameter_groups(reference, weight_decay=0.01), lr=1e-4, max_grad_norm=1.0
    )  # fmt: skip
    if ours:
        capture = options.device == "cuda"
        train = trainer(reference, optimizer, batches[0], products=not options.smoke, capture=capture)
    losses = []
    for number, batch in enumerate(batches):
        rate = 1e-4 * min(1.0, (number + 1) / 50)
        if ours:
            losses.append(float(train(batch, rate, number).scalars[:2].sum()))
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with autocast(options.device, "float32", options.smoke):
            loss = reference(**{k: v.to(options.device) for k, v in batch.padded.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
