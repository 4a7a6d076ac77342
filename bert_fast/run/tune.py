"""What a run's phases would be tuned to on this machine, shown: the command behind ``bert-fast tune``."""

from collections.abc import Iterator
from functools import partial

from bert_fast.data.graph_shapes import sample_lengths
from bert_fast.output import Output, Progress
from bert_fast.run.config import PretrainConfig
from bert_fast.run.pretrain import Run, kernels_of
from bert_fast.train.distributed import Ranks, started
from bert_fast.tuning import store
from bert_fast.tuning.candidates import questions
from bert_fast.tuning.decision import decide_now, key_of

OUT = ("wrong", "failed", "hung", "default wrong")


def tune(config: PretrainConfig, output: Output | None = None) -> dict:
    """Decides for each phase of ``config`` what is not decided yet (``tune="again"``: everything), keeps it where
    :func:`bert_fast.run.pretrain.pretrain` finds it, and gives {"phases"}: of each "seq", "batch_size", "kept" (whether
    it was decided before), "chosen" and "rows", which say how each candidate came out.

    ValueError where there is no GPU. Trains nothing, and writes nothing into the run's folder.
    """
    output = output or Output()
    with started(config.device) as ranks, kernels_of(config):
        if not on_gpu(ranks):
            raise ValueError("there is no GPU here, and on a CPU no kernel is chosen by trying")
        run, found = Run(config, ranks, output, few=True), []
        for phase in {(phase.seq, phase.batch_size): phase for phase in run.phases}.values():
            sizes = run.tuner.sizes(phase, sample_lengths(run.dataset, phase.seq))
            kept = None if config.tune == "again" else store.read(key_of(sizes, ranks.device))
            facts: dict = {"seq": phase.seq, "batch_size": phase.batch_size, "kept": kept is not None}
            if kept is None:
                capability = key_of(sizes, ranks.device)["machine"]["capability"]
                count = sum(len(question.candidates) for question in questions(sizes, capability))
                with output.progress(count, "tuning", "candidates") as bar:
                    decision = decide_now(sizes, ranks.device, partial(_advance, bar))
                kept = {"chosen": decision.chosen, "rows": decision.rows}
            found.append(facts | kept)
        facts = {"phases": found}
        output.result(facts, "\n".join(described(facts)))
    return facts


def _advance(bar: Progress, row: dict) -> None:
    bar.advance(1, row["question"])


def on_gpu(ranks: Ranks) -> bool:
    """Whether there is anything to choose."""
    return ranks.device.type == "cuda"


def described(facts: dict) -> Iterator[str]:
    """A table of each phase: a line a question, with what won, and the candidates that are out with their reason."""
    for phase in facts["phases"]:
        yield f"{phase['seq']} tokens, {phase['batch_size']} sequences" + (", decided before" if phase["kept"] else "")
        for name in dict.fromkeys(row["question"] for row in phase["rows"]):
            rows = [row for row in phase["rows"] if row["question"] == name]
            won = [row for row in rows if row["outcome"] == "won"]
            tried = sum("seconds" in row for row in rows)
            text = f"the default, {tried} of {len(rows)} candidates timed"
            if won:
                text = f"{settings(won[-1]['candidate'])}, {1e6 * won[-1]['seconds']:.0f} us"
            yield f"  {name:26} {text}"
            yield from (
                f"  {'':26} {row['outcome']}: {settings(row['candidate'])}: {row['why']}"
                for row in rows if row["outcome"] in OUT
            )  # fmt: skip


def settings(choices: dict) -> str:
    """A candidate in words."""
    return "; ".join(
        name.rpartition(".")[2] + " " + ", ".join(f"{key}={value}" for key, value in table.items())
        for name, table in choices.items()
    )
