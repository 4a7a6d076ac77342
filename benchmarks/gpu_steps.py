"""Phase 4: whole training steps, ours (eager and captured) against the reference's variants, and their loss curves."""

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import variants
from gpu_aims import SMALL
from gpu_results import Results
from measure import PeakMemory, quantiles, synchronize
from operators import masked_positions
from step_model import TOKENS, ceilings_of, lengths_of, predict, step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workload import Batch, Workload, model_config, random_batch

import bert_fast
from bert_fast.data import PretrainingDataset, capacities, pack_samples, pad_samples, special_ids
from bert_fast.flops import step_flops
from bert_fast.train.captured import Recorder
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Outcome, Step

DROPOUT = 0.1
SECONDS_OF_TIMING = 3
MOST_STEPS, FEWEST_STEPS = 20, 4
SECONDS_OF_A_CASE = {"hf-compile": 75}  # a case is not begun with less time left
SECONDS_OF_OTHERS = 12
CURVE_STEPS = 200
CURVES_AFTER = 8  # cases: ours and the reference's default at 512


@dataclass(frozen=True)
class Variant:
    """How a step is run: ``weights`` are the parameters' dtype, under bfloat16 autocast where float32."""

    name: str
    weights: str
    optimizer: str
    captured: bool = False


OURS = (
    Variant("bert_fast captured", "bfloat16", "lamb", True),
    Variant("bert_fast eager", "bfloat16", "lamb"),
    Variant("bert_fast captured, autocast", "float32", "adamw", True),
)
# The reference gets the fastest AdamW of PyTorch, one pass where LAMB takes two: the comparison leans its way.
THEIRS = tuple(Variant(name, "float32", "torch AdamW, fused") for name in ("hf-sdpa", "hf-eager", "hf-masked-head"))
COMPILED = Variant("hf-compile", "float32", "torch AdamW, fused")


def cases(options) -> list[tuple[Variant, str, int, str]]:
    """(variant, model, length of a full sequence, lengths) in the order of what is to be known first."""
    if options.smoke:
        cases = [(v, "micro", 24, kind) for kind in ("wikipedia", "full") for v in (*OURS, *THEIRS)]
        return [*cases, (OURS[0], "micro", 24, SMALL)]
    at_512 = [(m, 512, kind) for m in ("large", "base") for kind in ("wikipedia", "full")]
    at_128 = [(m, 128, kind) for m in ("base", "large") for kind in ("full", "wikipedia")]
    full_512 = [size for size in at_512 if size[2] == "full"]
    order = [(v, *size) for v in (OURS[0], THEIRS[0]) for size in at_512]
    order += [(v, "base", 128, SMALL) for v in OURS[:2]]
    order += [(COMPILED, *size) for size in full_512]
    order += [(v, *size) for v in (OURS[1], *THEIRS[1:], OURS[2]) for size in at_512]
    order += [(v, *size) for size in at_128 for v in (*OURS, *THEIRS)]
    return order + [(COMPILED, *size) for size in at_512 + at_128 if size not in full_512]


def autocast(device: str, weights: str, smoke: bool):
    """Products in bfloat16 whatever the weights; a trial on a CPU stays in float32, which is faster there."""
    if smoke or weights == "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def trainer(model, optimizer, batch: Batch, *, products: bool, capture: bool) -> Callable[..., Outcome]:
    """What `bert-fast pretrain` trains with, as ``train(batch, rate, seed)``, for batches of the shapes of ``batch``.

    ``products`` multiplies in bfloat16 under autocast.
    """

    def packed(batch: Batch) -> dict:
        return {**batch.packed, "max_length_q": batch.seq}

    def refuse(reason: str) -> None:
        raise RuntimeError(reason)  # what is called captured is

    recorder = Recorder(model.parameters()) if capture else None
    ranks = Ranks(0, 1, next(model.parameters()).device)
    step = Step(model, optimizer, ranks, bf16=products, recorder=recorder, tell=refuse)
    step.prepare([packed(batch)])

    def train(batch: Batch, rate: float, seed: int) -> Outcome:
        return step([packed(batch)], seed=seed, lr=rate, predicted=batch.predicted, sequences=len(batch.lengths))

    return train


def our_step(variant: Variant, config, batch: Batch, options) -> Callable[[], Outcome]:
    """A function that trains one step of ours."""
    from bert_fast import optim

    torch.manual_seed(0)
    kind = torch.float32 if options.smoke or variant.weights == "float32" else torch.bfloat16
    with torch.device(options.device):
        model = bert_fast.BertForPreTraining(config).to(kind).train()
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


def measure(variant: Variant, model: str, seq: int, kind: str, options, results: Results) -> dict:
    """One row. A batch that does not fit the memory is halved; rates are per second, so they still compare."""
    config = model_config(model, dropout=DROPOUT)
    lengths = [seq] * 8 if kind == SMALL else lengths_of(kind, seq, 96 if options.smoke else TOKENS)
    while True:
        try:
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


def kernel_seconds(run: Callable[[], object], device: str, steps: int = 5) -> float | None:
    """What the kernels and copies of a step take by themselves; None where the profiler sees none."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as found:
        for _ in range(steps):
            run()
        synchronize(device)
    kernels = [e for e in found.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(e.time_range.elapsed_us() for e in kernels) / steps / 1e6 or None


def measure_batch(
    variant: Variant, config, seq: int, lengths: list[int], options, results: Results, *, kernels: bool
) -> dict:
    ours = variant.name.startswith("bert_fast")
    predicted = masked_positions(lengths)
    batch = random_batch(lengths, predicted, seq, options.device, nsp=True, vocabulary=config.vocab_size)
    with PeakMemory(options.device) as peak:
        run = (our_step if ours else their_step)(variant, config, batch, options)
        first = run()
        loss = float(first.scalars[:2].sum() if ours else first)
        run()  # the first backward had no optimiser's state beside it, unless a rehearsal made that
    times = timed_steps(run, options.device, options.smoke)
    alone = kernel_seconds(run, options.device) if kernels else None
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
    if alone is not None:
        row["kernels_ms"] = 1e3 * alone
    if ours:
        ceilings = ceilings_of(results.data)
        expected = predict(config, lengths, step(config, lengths, variant.weights, variant.optimizer), ceilings)
        host = 0.0 if variant.captured else expected.launches * ceilings.launch
        row["predicted_ms"] = 1e3 * max(expected.seconds, host)
    return row


def run(results: Results, options) -> None:
    """Fills "steps" and "curves"."""
    order = cases(options)
    for number, (variant, model, seq, kind) in enumerate(order):
        if number == min(CURVES_AFTER, len(order) - 1):
            curves(results, options)
        if time.time() > options.until - SECONDS_OF_A_CASE.get(variant.name, SECONDS_OF_OTHERS):
            results.add("steps_left_out", f"{model} {seq} {kind} {variant.name}")
            continue
        facts = {"model": model, "seq": seq, "lengths": kind, "variant": variant.name, "weights": variant.weights,
                 "optimizer": variant.optimizer}  # fmt: skip
        results.case(
            4, f"{model} {seq} {kind}, {variant.name}", "steps", facts,
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
        if time.time() > options.until - SECONDS_OF_OTHERS and not options.smoke:
            results.add("steps_left_out", f"loss curve of {name}")
            continue

        def measure(name=name) -> dict:
            if not made:
                made.append(curve_batches(count, sequences, seq)[0])
            return {"losses": curve(name, model, made[0], options)}

        facts = {"variant": name, "model": model, "seq": seq, "sequences": sequences}
        results.case(4, f"loss curve, {name}", "curves", facts, measure)
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
