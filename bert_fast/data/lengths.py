"""The length distribution of Wikipedia pre-training sequences, for benchmarks and tests."""

import json
from pathlib import Path

import numpy as np


def wikipedia_lengths() -> np.ndarray:
    """int64 (512,): how many sequences have length 1 .. 512 (special tokens included) at maximum length 512.

    Source: Krell et al., "Efficient Sequence Packing without Cross-contamination", arXiv 2107.02027.
    """
    text = Path(__file__).with_name("wikipedia_lengths.json").read_text(encoding="utf-8")
    return np.array(json.loads(text)["counts_for_length_1_to_512"], dtype=np.int64)


def draw_wikipedia_lengths(count: int, *, seed: int = 0, max_length: int = 512) -> np.ndarray:
    """int64 (count,): lengths drawn from :func:`wikipedia_lengths`; longer than ``max_length`` means ``max_length``."""
    counts = wikipedia_lengths()
    drawn = np.random.default_rng(seed).choice(len(counts), size=count, p=counts / counts.sum()) + 1
    return np.minimum(drawn, max_length)
