"""Candidates that are made up, for a worker's process: each says by itself how it comes out."""

import os
import sys
import time


def answer(message: dict) -> dict:
    """As bert_fast.tuning.trials.answer, by the challenger's "made" settings: "ratio" (time over the default's), or
    "does" something else."""
    made = message["challenger"].get("made", {})
    does = made.get("does")
    if does == "hang":
        time.sleep(1000)
    if does == "die":
        os._exit(3)
    if does == "wrong":
        return {"wrong": "off by 7"}
    if does == "raise":
        return {"failed": "RuntimeError: out of resource"}
    if does == "chatter":
        print("noise" * 100000, file=sys.stderr)
        print("noise" * 100000)
    old, new = message["incumbent"].get("made", {}).get("ratio", 1.0), made.get("ratio", 1.0)
    replaced = {name: {"tile": 64} for name in message["challenger"]}
    return {"times": [[[old] * 20, [new] * 20], [[old] * 20, [new] * 20]], "replaced": replaced}


def pid(message: dict) -> dict:
    return {"pid": os.getpid()}
