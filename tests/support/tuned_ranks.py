"""A process of several whose ranks would each decide something else, if they were asked: prints what serves in it."""

import sys

import numpy as np

import bert_fast
from bert_fast import choice
from bert_fast.output import Output
from bert_fast.run import tuner
from bert_fast.run.config import PretrainConfig, phases
from bert_fast.train.distributed import started
from bert_fast.tuning import store
from bert_fast.tuning.rule import Decision


def main() -> None:
    with started("cpu") as ranks:
        mine = Decision([("made", {"tile": 64}, {"tile": 100 + ranks.rank})], [])
        tuner.decide_now = lambda sizes, device, **how: mine
        tuner.Tuner.tunes = lambda run: True
        store.machine = lambda device: {"device": f"that of rank {ranks.rank}"}
        config = PretrainConfig(data="none", out="none", seq=32, steps=2, device="cpu")
        model = bert_fast.BertConfig(hidden_size=64, num_attention_heads=2)
        found = tuner.Tuner(config, ranks, Output(silent=True), model, bf16=False, tokens=256, recorded={})
        for phase in phases(config) * 2:
            found.settle(phase, np.array([5, 20 + ranks.rank]))
        kept = found.state["32:256"]
        print(choice.of("made", {"tile": 64})["tile"], kept["key"]["machine"]["device"])
        ranks.wait()


if __name__ == "__main__":
    sys.exit(main())
