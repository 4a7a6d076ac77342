"""What a GPU proves in the time that it is there for: a list of cases, what is to be known first before the rest.

    python benchmarks/gpu.py [--budget 560] [--case PART ...] [--smoke] [--list] [--out DIR]

Each case has a price in seconds and is left out where less is left; every row is saved as it comes, and a hang or a
lost device costs one case (supervise.py). Needs no network, no installation and no C++ compiler for itself. The results
are benchmarks/results/<gpu>/<date>-<commit>.json, .md and pictures. The exit status is 0 where every case that had time
ran to its end, 1 where one failed, 2 for bad arguments. --smoke runs all of them on a CPU with tiny sizes.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

import torch
import transformers

from benchmarks import clock, device_tests, limits, operators, parity, report, results, steps, tables, tune, workload
from benchmarks.clock import Clock
from benchmarks.contenders import CANDIDATES, CONTENDERS, REFERENCES, Setting, build, capability, why_unavailable
from benchmarks.predict.step_model import CHANGES, ceilings_of, operator_seconds, predict, step, update
from benchmarks.results import ROOT, Results
from benchmarks.supervise import Case, supervise, work
from benchmarks.workload import TOKENS, lengths_of, masked_positions, model_config, random_batch, wikipedia_quantiles
from bert_fast import choice, dispatch
from bert_fast.tuning.candidates import Sizes, questions
from bert_fast.tuning.decision import SECONDS, tried
from bert_fast.tuning.rule import Question

BF16 = torch.bfloat16
SMALL = "8 full"  # lengths of a batch so small that launches count


class Heartbeat(tables.Bar):
    """Progress that the supervisor sees, too: a table may take longer than it waits for a word."""

    def __init__(self, found: Results):
        self.found = found

    def phase(self, text: str, total: int | None = None) -> None:
        super().phase(text, total)
        self.found.save()


class Run:
    """The cases of a run on ``device``; with ``smoke`` all of them at tiny sizes."""

    def __init__(self, smoke: bool, until: float):
        self.smoke, self.until, self.device = smoke, until, "cpu" if smoke else "cuda"
        self.dtype = torch.float32 if smoke else BF16  # Triton's interpreter is slow in 16 bits
        self.models, self.tokens, self.rounds = (("micro",), 96, 1) if smoke else (("large", "base"), TOKENS, 7)
        self.lengths = (512,) if smoke else (512, 128)

    def cases(self) -> list[Case]:
        """In the order of what is to be known first; what falls off the end is what matters least."""
        large, base, both = self.models[0], self.models[-1], ("full", "wikipedia")
        rows = ("residual_layernorm", "bias_gelu", "embedding_layernorm", "mlm_loss", "feed_forward")
        found = [
            Case("versions", 15, self.versions),
            Case("limits", 20, self.measure_limits),
            Case("gate: operators and the step against float64", 50, self.gate),
            Case("attention", 40, partial(self.measure_attention, large)),
            *(self.table("headline", 45, large, 512, kind, "hf-sdpa") for kind in both),
            *(self.table("hf-compile", 40, large, 512, kind, "hf-compile") for kind in both),
            Case(f"profiles, {large} 512 and {base} 8 x 128", 25, self.profiles),
            Case("row operators and optimisers", 50, partial(self.measure_operators, large, 512, "full", rows)),
            *(self.table("headline", 15, base, seq, kind, "hf-sdpa")
              for seq, kind in ((512, "full"), (512, "wikipedia"), (128, "full"), (128, SMALL))),
            Case("tests on the device", 70, self.tests),
            Case("launch grids of the two worst", 60, partial(self.tune, 0, 2)),
            # what an hour would have room for
            *(self.table("candidates", 60, large, 512, kind, "bert_fast-eager", "bert_fast-16bit", *CANDIDATES)
              for kind in both),
            *(self.table("16-bit weights and LAMB", 30, large, 512, kind, "bert_fast-16bit", optimizer="lamb")
              for kind in both),
            *(self.table("all references", 90, model, seq, kind, *REFERENCES)
              for model in self.models for seq in self.lengths for kind in both),
            *(Case(f"operators, {model} {seq} {kind}", 45, partial(
                self.measure_operators, model, seq, kind, operators.OF_THE_MODEL, compiled=kind == "full"
            )) for model in self.models for seq in self.lengths for kind in both),
            Case("the step in float32 against float64", 20, partial(self.whole_model, torch.float32)),
            *(Case(f"products of {model}'s step", 20, partial(self.products, model)) for model in self.models),
            *(Case(f"loss curve of {who}", 40, partial(self.curve, who)) for who in ("bert_fast", "hf-sdpa")),
            Case("launch grids of the others", 180, partial(self.tune, 2, None)),
            *(Case(f"kernels chosen for {large} 512 wikipedia, dropout {p}", 180, partial(self.choose, large, p))
              for p in (0.1, 0.0)),
        ]  # fmt: skip
        return list({case.name: case for case in found}.values())

    def table(self, what: str, price: float, model: str, seq: int, kind: str, *names: str, **options) -> Case:
        """The case of a table of steps, ours beside ``names``."""
        run = partial(self.measure_steps, model, seq, kind, ("bert_fast", *names), **options)
        return Case(f"{what}, {model} {seq} {kind}", price, run)

    def setting(self, optimizer: str = "adamw", dtype: torch.dtype | None = None) -> Setting:
        return Setting(self.device, dtype or self.dtype, optimizer=optimizer)

    def sizes(self, seq: int, kind: str) -> tuple[int, list[int]]:
        """The tokens of a full sequence, and of each: in a trial all are short."""
        seq = 24 if self.smoke else seq
        return seq, [seq] * 8 if kind == SMALL else lengths_of(kind, seq, self.tokens)

    def batch(self, model: str, seq: int, kind: str, sequences: int):
        lengths = wikipedia_quantiles(sequences, seq) if kind == "wikipedia" else [seq] * sequences
        return random_batch(lengths, masked_positions(lengths), seq, self.device, nsp=True,
                            vocabulary=model_config(model, dropout=0.0).vocab_size)  # fmt: skip

    def launchers(self):
        """In a trial operators alone have the launchers that a GPU would run, under Triton's interpreter."""
        interpreted = self.smoke and dispatch.why_unavailable("triton") is None
        return dispatch.use_backend("triton") if interpreted else contextlib.nullcontext()

    # what each case does

    def versions(self, found: Results) -> None:
        versions = found.data["environment"]["versions"]
        versions["cuda"], versions["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        for name, command in (("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
                              ("ptxas", [ptxas(), "--version"])):  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=10)
                versions[name] = done.stdout.strip().splitlines()[-1]
            except (OSError, IndexError, subprocess.TimeoutExpired) as error:
                versions[name] = f"unknown: {type(error).__name__}"
        found.save()

    def measure_limits(self, found: Results) -> None:
        found.put("limits", limits.measure(Clock(self.device), {BF16, torch.float32}, small=self.smoke))

    def gate(self, found: Results) -> None:
        """Every operator and candidate, then the whole step. Raises RuntimeError where something is not right."""
        model = self.models[-1]
        seq, lengths = (24, [24, 9]) if self.smoke else (512, [512, 84, 301, 512])
        for operator in operators.OPERATORS:
            names = ["bert_fast", *(
                name for name in CANDIDATES if why_unavailable(name, self.setting()) is None
                and any(kernel.startswith(operator) for kernel in CONTENDERS[name].ours.choices)
            )]  # fmt: skip
            with self.launchers():
                rows = parity.operator_rows(operator, self.device, self.dtype, model=model, seq=seq, lengths=lengths,
                                            contenders=names)  # fmt: skip
            found.add("parity", {"what": operator, "dtype": limits.NAMES[self.dtype]} | parity.summary(rows))
        self.whole_model(self.dtype, found)
        if wrong := [x["what"] for x in found.data["parity"] if not x["passed"]]:
            raise RuntimeError(f"not found right, see parity: {', '.join(wrong)}")

    def whole_model(self, dtype: torch.dtype, found: Results) -> None:
        model, seq, lengths = ("micro", 24, [24, 9]) if self.smoke else ("base", 512, [512, 84, 301, 512])
        config = model_config(model, dropout=0.0)
        batch = random_batch(lengths, masked_positions(lengths), seq, self.device, nsp=True,
                             vocabulary=config.vocab_size)  # fmt: skip
        rows = parity.compare(config, batch, self.setting("none", dtype))
        found.add("parity", {"what": f"the step of {model}", "dtype": limits.NAMES[dtype]} | parity.summary(rows))
        if not found.data["parity"][-1]["passed"]:
            raise RuntimeError(f"the step of {model} in {limits.NAMES[dtype]} is not right, see parity")

    def measure_attention(self, model: str, found: Results) -> None:
        for seq, kind, dropout in ((512, "full", 0.1), (512, "full", 0.0), (512, "wikipedia", 0.1), (128, "full", 0.1)):
            self.measure_operators(model, seq, kind, ("attention",), found, dropout=dropout, optimisers=False)

    def measure_operators(
        self, model: str, seq: int, kind: str, names: Sequence[str], found: Results, *,
        dropout: float = operators.DROPOUT, compiled: bool = False, optimisers: bool = True,
    ) -> None:  # fmt: skip
        own, measured = Clock(self.device), found.data.get("limits", {})
        real, lengths = self.sizes(seq, kind)
        config = model_config(model, dropout=dropout)
        for name in names:
            with self.launchers():
                rows = operators.measure(
                    own, name, self.dtype, model=model, seq=real, lengths=lengths, kind=kind, limits=measured,
                    rounds=self.rounds, dropout=dropout, parameters=self.dtype, compiled=compiled and not self.smoke,
                )  # fmt: skip
            for x in rows:
                if x["contender"] == "bert_fast":
                    x["predicted_ms"] = 1e3 * operator_seconds(
                        config, lengths, name, x["direction"], ceilings_of(found.data)
                    )
            found.add("operators", *rows)
        for weights in (torch.float32, BF16) if optimisers else ():
            rows = operators.measure_optimizers(own, model, limits=measured, rounds=self.rounds, weights=weights)
            for x in rows:
                if x["contender"] == "bert_fast" and x["operator"] != "norm":
                    lines = update(config, limits.NAMES[weights], x["operator"])
                    x["predicted_ms"] = 1e3 * sum(line.seconds(ceilings_of(found.data)) for line in lines)
            found.add("operators", *rows)

    def measure_steps(
        self, model: str, seq: int, kind: str, names: Sequence[str], found: Results, *, optimizer: str = "adamw"
    ) -> None:
        """A table; candidates are held against ours as built first. What cannot run here says why in its row."""
        setting, (real, lengths) = self.setting(optimizer), self.sizes(seq, kind)
        entries, refused, differs = [], [], {}
        for name in names:
            why = why_unavailable(name, setting)
            if self.smoke and name == "hf-compile":
                why = "a trial compiles nothing"
            try:
                if why is None and name in CANDIDATES:
                    found.save()  # a comparison of whole models takes long: the supervisor sees work go on
                    differs[name] = parity.same_step(
                        name, model_config(model, dropout=steps.DROPOUT), self.batch(model, real, kind, 4), setting
                    )
            except RuntimeError as error:
                why = results.reason(error)
            if why:
                refused.append({"model": model, "seq": real, "lengths": kind, "contender": name, "failed": why,
                                "sequences": 0, "dtype": limits.NAMES[self.dtype], "optimizer": optimizer})  # fmt: skip
                continue
            ours = CONTENDERS[name].ours
            paddings = ["packed"] if ours else ["padded", "longest"] if kind == "wikipedia" else ["padded"]
            # each compiles for a minute: the faster one
            entries += [(name, padding) for padding in (paddings[-1:] if name == "hf-compile" else paddings)]
        plan = steps.Plan(
            model=model, lengths=kind, sequences=len(lengths), batch_of=partial(self.batch, model, real, kind),
            setting=setting, limits=found.data.get("limits", {"matmul_tflops": {}}), rounds=self.rounds, halve=True,
            with_memory=not self.smoke,
        )  # fmt: skip
        with Heartbeat(found) as bar:
            rows = steps.measure(plan, entries, bar, f"{model} {real} {kind}")
        for x in rows:
            if "failed" not in x and CONTENDERS[x["contender"]].ours:
                x["predicted_s"] = self.predicted(x, plan.batch_of(x["sequences"]).lengths, found.data)
            if x["contender"] in differs:
                x["differs"] = differs[x["contender"]]
        found.add("steps", *rows, *refused)

    def predicted(self, x: dict, lengths: list[int], data: dict) -> float:
        """What the step model has for a row of ours; an eager step takes no less than the host to launch it."""
        ours, config = CONTENDERS[x["contender"]].ours, model_config(x["model"], dropout=steps.DROPOUT)
        lines = step(config, lengths, limits.NAMES[ours.weights], x["optimizer"])
        for change in CHANGES.get(x["contender"], ()):
            lines = [change(line) for line in lines]
        expected = predict(config, lengths, lines, ceilings_of(data))
        return max(expected.seconds, 0.0 if ours.captured else expected.launches * ceilings_of(data).launch)

    def profiles(self, found: Results) -> None:
        for model, seq, kind in ((self.models[0], 512, "full"), (self.models[-1], 128, SMALL)):
            real, lengths = self.sizes(seq, kind)
            config, batch = model_config(model, dropout=steps.DROPOUT), self.batch(model, real, kind, len(lengths))
            run = build("bert_fast", config, self.setting()).step(batch)
            run()  # it is recorded
            kernels = clock.kernels_of(run, self.device)
            if not kernels:
                raise RuntimeError("the profiler saw no kernel")
            found.add("profiles", {"model": model, "seq": real, "lengths": kind, "sequences": len(lengths),
                                   "kernels_s": sum(x["us"] for x in kernels) / 1e6, "kernels": kernels})  # fmt: skip

    def tests(self, found: Results) -> None:
        files = [ROOT / "tests" / "test_packing.py"] if self.smoke else device_tests.files()
        last = max(time.time() + 70, self.until - 60)  # what the next case asks for is left
        device_tests.run(found, files, min(last, time.time() + 600))

    def tune(self, first: int, last: int | None, found: Results) -> None:
        names = tune.furthest(found.data.get("operators", []))[first:last]
        until = min(self.until, time.time() + 180) if last else self.until
        options = {"choices": [{"num_warps": 2}], "dtype": self.dtype, "tokens": 48, "repeat": 1} if self.smoke else {}
        for seq in (24,) if self.smoke else (512, 128):
            wanted = [n for n in names if seq != 128 or n == "attention"]  # the row operators know no sequences
            wanted = [n for n in wanted if n != "feed_forward" or capability(self.device) in (90, 100)]
            with self.launchers():
                tune.sweeps(found, wanted, device=self.device, model=self.models[0], seq=seq, until=until, **options)

    def choose(self, model: str, dropout: float, found: Results) -> None:
        """What `bert-fast pretrain` would choose here; nothing is kept."""
        (seq, lengths), config = self.sizes(512, "wikipedia"), model_config(model, dropout=dropout)
        sizes = Sizes(
            hidden=config.hidden_size, inner=config.intermediate_size, heads=config.num_attention_heads,
            vocabulary=config.vocab_size, longest=seq, lengths=tuple(sorted(lengths, reverse=True)),
            masked=masked_positions(lengths), dtype=limits.NAMES[self.dtype], dropout=(dropout, dropout),
        )  # fmt: skip
        asked = questions(sizes, capability(self.device) or 0)
        if self.smoke:  # the loss has a candidate on a CPU, too
            asked = [Question("mlm_loss chunk", "mlm_loss", [{"mlm_loss.chunk": {"cpu": 4}}])]
        about = {"what": f"{model} {seq}, dropout {dropout}"}
        tried(asked, sizes, self.device, tell=lambda row: found.add("choices", about | row),
              seconds=min(SECONDS, self.until - time.time()))  # fmt: skip

    def products(self, model: str, found: Results) -> None:
        tokens, repeat = (64, 1) if self.smoke else (TOKENS, 10)
        config = model_config(model, dropout=0.0)
        rows = limits.products_of_a_step(Clock(self.device), config, tokens, repeat=repeat)
        found.add("products", *({"model": model} | x for x in rows))

    def curve(self, name: str, found: Results) -> None:
        """The loss of every step over some hundred updates of real text: AdamW with a linear warm-up to 1e-4, the same
        weights, batches and schedule for each, with masks of its own."""
        model, sequences, seq, count = ("micro", 4, 32, 4) if self.smoke else ("base", 64, 128, 200)
        config = model_config(model, dropout=steps.DROPOUT)
        config.vocab_size = max(config.vocab_size, workload.VOCABULARY)
        batches = workload.Workload().batches(count, sequences, seq, self.device)
        torch.manual_seed(0)
        weights = transformers.BertForPreTraining(config).state_dict()
        built = build(name, config, self.setting(), weights=weights)
        step = built.step(batches[0])
        losses = [float(built.loss(step(x, 1e-4 * min(1.0, (n + 1) / 50)))) for n, x in enumerate(batches)]
        found.add("curves", {"contender": name, "model": model, "seq": seq, "sequences": sequences, "losses": losses})


def ptxas() -> str:
    """The assembler that Triton calls."""
    try:
        from triton import knobs

        return knobs.nvidia.ptxas.path
    except (ImportError, AttributeError, RuntimeError):
        return "ptxas"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=560, metavar="SECONDS", help="for everything (default 560)")
    parser.add_argument("--case", nargs="+", metavar="PART", help="those whose name has it, after versions and limits")
    parser.add_argument("--list", action="store_true", help="print the cases with their prices, and what fits, and end")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: does every case run?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default benchmarks/results/<gpu>")
    parser.add_argument("--commit", help="what the results are called after where the checkout has no history")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.budget <= 0:
        parser.error("--budget is a number of seconds above 0")
    if not (options.smoke or options.list or torch.cuda.is_available()):
        parser.error("torch sees no GPU here (python benchmarks/gpu.py --smoke tries every case on the CPU)")
    cases = Run(options.smoke, 0.0).cases()
    wanted = options.case or [""]
    if unknown := [part for part in wanted if not any(part in case.name for case in cases)]:
        parser.error(f"--case: no case's name has {unknown[0]!r}; --list prints them")
    options.cases = {c.name for c in cases if c.name in ("versions", "limits") or any(p in c.name for p in wanted)}
    return options


def worker(options: argparse.Namespace) -> int:
    """What runs in a process of its own: exit status 0 where all is done."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.smoke:
        clock.CACHE_BYTES["cpu"] = 1 << 16
    run = Run(options.smoke, options.until)
    with choice.held():  # what this machine has kept is no part of what is measured
        return work([case for case in run.cases() if case.name in options.cases], Results(options.file), options.until)


def show_cases(budget: float) -> None:
    rows, spent = [], 0.0
    for case in Run(False, 0.0).cases():
        fits = spent + case.seconds <= budget
        spent += case.seconds * fits
        rows.append([case.name, f"{case.seconds:.0f}", "yes" if fits else ""])
    tables.Table(["case", "price, s", f"within {budget:.0f} s"], rows).show()


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.list:
        show_cases(options.budget)
        return 0
    if options.file:
        code = worker(options)
        sys.stdout.flush()
        if code:  # Python's end gives all memory back; on a lost device torch aborts there, with a status of its own
            os._exit(code)
        return code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given = sys.argv[1:] if argv is None else argv
    data = results.begun("gpu", "cpu" if options.smoke else "cuda", ["benchmarks/gpu.py", *given],
                         smoke=options.smoke, version=options.commit) | {"budget": options.budget}  # fmt: skip
    found, until = Results(results.new_path(data, folder=options.out), data), time.time() + options.budget
    print(f"{data['device']}, commit {data['commit']}: {found.path}", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--file", str(found.path), "--until", str(until)]
    command += ["--smoke"] * options.smoke + (["--case", *options.case] if options.case else [])
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)  # the interpreter is for trials; it must not be timed
    if options.smoke:
        environment["TRITON_INTERPRET"] = "1"
    environment.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched; without a network nothing waits to learn that
    if not os.access(Path.home(), os.W_OK):  # where compiled kernels would be kept
        environment.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "bert_fast-triton"))
    try:
        supervise(command, environment, found, until, *[600.0] * options.smoke)  # an interpreter is slow
    finally:
        report.write_beside(found)
    print(found.path.with_suffix(".md").read_text(encoding="utf-8"))
    return 1 if any(case["state"] in ("failed", "lost") for case in found.data["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
