"""sum_rows: rows summed by an index, exact in whole numbers, so that every row counts once and in no other place."""

import pytest
import torch

pytest.importorskip("triton")

from bert_fast import dispatch
from bert_fast.kernels import sum_rows as kernel
from tests.support.parity import DEVICE

pytestmark = pytest.mark.skipif(dispatch.why_unavailable("triton") is not None, reason="needs Triton")


def sums(index, count, columns, *, add=False, dtype=torch.float32, run=16):
    x = torch.randint(-999, 999, (len(index), columns), device=DEVICE).float()
    out = torch.randint(-999, 999, (count, columns), device=DEVICE).to(dtype) if add else torch.full(
        (count, columns), float("nan"), dtype=dtype, device=DEVICE
    )  # fmt: skip
    index = index.to(DEVICE)
    expected = torch.zeros(count + 1, columns, device=DEVICE).index_add_(0, index, x)[:count].to(dtype)
    expected = out + expected if add else expected
    kernel.sum_rows(x, index.int(), out, kernel.launch_config(columns) | {"RUN": run}, add=add)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 48, 130])
def test_every_row_counts_once(tokens, add):
    """Stretches shorter and longer than a run, at every offset; the last index is that of rows that go nowhere."""
    for most in (2, 20, 60):
        stretches = torch.arange(tokens).repeat_interleave(torch.randint(1, most, (tokens,)))[:tokens]
        count = max(1, tokens // most)
        sums(stretches.clamp(max=count)[torch.randperm(tokens)], count, 3, add=add)


@pytest.mark.parametrize("tokens", [15, 16, 32, 50])
def test_all_rows_have_one_index(tokens):
    for index in (0, 4, 5):
        sums(torch.full((tokens,), index), 5, 7)


@pytest.mark.parametrize(("columns", "dtype"), [(1, torch.bfloat16), (300, torch.float16), (1500, torch.float32)])
def test_widths_and_dtypes(columns, dtype):
    """A total of more digits than 16 bits have is rounded before it is added, as a tensor of its own would be."""
    for add in (False, True):
        sums(torch.randint(0, 4, (70,)), 3, columns, add=add, dtype=dtype)


def test_a_table_without_rows():
    sums(torch.zeros(9, dtype=torch.int64), 0, 8)
