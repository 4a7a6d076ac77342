"""What serves in each phase of a run: as the run has recorded it, as this machine knows it already, or decided now."""

import json
from collections.abc import Callable

import numpy as np

from bert_fast import choice
from bert_fast.data.masking import masked_count
from bert_fast.data.phase import Phase
from bert_fast.output import Output
from bert_fast.run.config import ConfigError, PretrainConfig
from bert_fast.train.distributed import Ranks
from bert_fast.tuning import store
from bert_fast.tuning.candidates import Sizes, dtype_of, why_no_library
from bert_fast.tuning.decision import decide_now, key_of


class Tuner:
    """Settles, phase by phase, what was found fastest on this machine, the same on all processes.

    ``model`` is a BertConfig; ``recorded`` what a checkpoint has of ``state``: of each phase the key that a decision
    was made for, and what was chosen. A decision for the same key serves again, so that a run that resumes has the
    same bits; where machine, versions or sizes are others, it does not. One that ``decides`` nothing looks up alone.
    ConfigError where ``--attention library`` cannot be had.
    """

    def __init__(
        self, config: PretrainConfig, ranks: Ranks, output: Output, model, *, bf16: bool, tokens: int, recorded: dict,
        decides: bool = True,
    ):  # fmt: skip
        self.config, self.ranks, self.output, self.model = config, ranks, output, model
        self.dtype, self.tokens = "bfloat16" if bf16 else "float32", tokens
        self.recorded, self.state, self.decides = recorded, dict(recorded), decides
        self.stopped: Callable[[], bool] = lambda: False  # whether the run is asked to stop
        self._settled: set[str] = set()  # phases that this process has asked for already
        self.masks_by_place = config.attention == "library" and model.attention_probs_dropout_prob > 0
        if config.attention == "library":
            self._require_library()

    def settle(self, phase: Phase, lengths: np.ndarray) -> None:
        """What serves in ``phase``, from here on; ``lengths`` are those of some of its sequences, in tokens."""
        if not self.tunes():
            return
        name = f"{phase.seq}:{phase.batch_size}"
        if name not in self._settled:
            found = self._found(name, self.sizes(phase, lengths)) if self.ranks.first else None
            self.state[name] = json.loads(self.ranks.broadcast(json.dumps(found)))
            self._settled.add(name)
        choice.forget()
        choice.settle(store.decided(self.state[name]["chosen"]))

    def tunes(self) -> bool:
        """Whether anything is to be chosen here: not on a CPU, whose operators have no candidates."""
        if self.ranks.device.type == "cuda":
            return self.config.tune != "off"
        if self.config.tune == "again":
            self.output.note("--tune again: there is nothing to choose on a CPU")
        return False

    def sizes(self, phase: Phase, lengths: np.ndarray) -> Sizes:
        """A micro-batch of ``phase``: evenly spaced among ``lengths``, longest first, as many as it has room for."""
        model = self.model
        count = max(1, int(min(self.tokens / max(1.0, lengths.mean()), phase.batch_size)))
        spaced = np.sort(lengths)[np.linspace(len(lengths) - 1, 0, count).round().astype(int)]
        return Sizes(
            hidden=model.hidden_size, inner=model.intermediate_size, heads=model.num_attention_heads,
            vocabulary=model.vocab_size, longest=phase.seq, lengths=tuple(map(int, spaced)),
            masked=int(masked_count(spaced, max(phase.mask_probs)).sum()), dtype=self.dtype,
            dropout=(model.attention_probs_dropout_prob, model.hidden_dropout_prob), attention=self.config.attention,
        )  # fmt: skip

    def _found(self, name: str, sizes: Sizes) -> dict:
        key, recorded = key_of(sizes, self.ranks.device), self.recorded.get(name)
        if self.config.tune == "auto" or not self.decides:
            if recorded and recorded["key"] and store.same(recorded["key"], key):
                chosen, wrong = store.decided(recorded["chosen"]), recorded.get("wrong")
                return self._told(sizes, key, chosen, "as the run has them recorded", wrong)
            if recorded and recorded["key"]:
                self.output.note(
                    f"the kernels recorded for {name} were chosen on another device, with other versions or for other "
                    "sizes: they are chosen anew, and the run's last bits may differ"
                )
            if kept := store.read(key):
                return self._told(sizes, key, kept["chosen"], "as chosen before on this machine")
        if not self.decides:
            return {"key": key, "chosen": [], "wrong": None}
        self.output.note(f"choosing kernels for {sizes.longest} tokens (--tune off does not)")
        found = decide_now(sizes, self.ranks.device, stopped=self.stopped)
        if not found.tried:
            reasons = [row["why"] for row in found.rows if "why" in row]
            self.output.note(f"no kernel could be tried: {reasons[0] if reasons else 'the time was up'}")
        if self.stopped():  # cut short: nothing that a run which goes on should have to keep
            return {"key": None, "chosen": found.chosen, "wrong": found.wrong}
        return self._told(sizes, key, found.chosen, "chosen now", found.wrong)

    def _told(self, sizes: Sizes, key: dict, chosen: store.Decided, how: str, wrong: str | None = None) -> dict:
        names = ", ".join(f"{name} {instead}" for name, _, instead in chosen) or "the defaults"
        self.output.note(f"kernels for {sizes.longest} tokens, {how}: {names}")
        if wrong:
            self.output.warn(
                f"kernels are WRONG on this device, and what is trained with them is not to be trusted: {wrong}. Other "
                "versions of triton or of the driver may help (bert-fast env)"
            )
        return {"key": key, "chosen": chosen, "wrong": wrong}

    def _require_library(self) -> None:
        model, dropout = self.model, self.model.attention_probs_dropout_prob
        size = model.hidden_size // model.num_attention_heads
        reason = why_no_library(self.ranks.device.type, dtype_of(self.dtype), size, dropout)
        if reason:
            raise ConfigError(f"--attention library: {reason}")
        if dropout and self.config.recompute == "layers":
            raise ConfigError(
                "--attention library draws masks that --recompute layers cannot draw again: leave one out"
            )
        self.output.note(
            "attention is PyTorch's (--attention library)"
            + (": its dropout masks depend on how updates are dealt into batches" if dropout else "")
        )
