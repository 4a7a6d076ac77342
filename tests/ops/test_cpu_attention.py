"""attention in C++: rows and heads of odd length or size take nothing from their neighbours in memory."""

import pytest
import torch

from bert_fast import dropout_mask
from bert_fast.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no C++ operators: {cpu.why_unavailable()}")


def run(qkv, grad_out, bounds, row_key, p):
    from bert_fast.kernels.cpu import attention

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    arguments = (cu_seqlens, qkv.shape[0], row_key, torch.tensor([77]), 0.3, p, 3)
    out, lse = attention.attention_fwd(qkv, *arguments)
    return out, *attention.attention_bwd(grad_out, qkv, out, lse, *arguments, torch.float32), lse


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "size"), [(1, 1), (33, 7), (49, 16), (97, 33)])
def test_nan_beside_a_sequence_and_a_head(length, size, dtype, p):
    """The same bits as the sequence alone with one head, where the other sequences and heads are NaN."""
    bounds = [0, 5, 5 + length, 9 + length]
    row_key = dropout_mask.row_keys(torch.tensor(bounds, dtype=torch.int32), bounds[-1])
    mine = slice(5, 5 + length)
    qkv = torch.full((bounds[-1], 3, 2, size), torch.nan, dtype=dtype)
    grad_out = torch.full((bounds[-1], 2, size), torch.nan, dtype=dtype)
    qkv[mine, :, 0], grad_out[mine, 0] = torch.randn(length, 3, size).to(dtype), torch.randn(length, size).to(dtype)
    out, grad, _, lse = run(qkv, grad_out.flatten(1), bounds, row_key, p)
    alone = run(qkv[mine, :, :1].contiguous(), grad_out[mine, 0].contiguous(), [0, length], row_key[mine], p)
    alone = (*alone[:2], alone[3])
    for ours, expected in zip((out[mine, :size], grad[mine, :, :1], lse[:1, mine]), alone, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_bias_of_a_head_beside_nan(size, dtype):
    """The same bits as with one head, where the other head and the tokens past the last sequence are NaN."""
    bounds = [0, 40, 40, 97]
    row_key = dropout_mask.row_keys(torch.tensor(bounds, dtype=torch.int32), 100)
    qkv, grad_out = torch.full((100, 3, 2, size), torch.nan), torch.full((100, 2, size), torch.nan)
    qkv[:97, :, 1], grad_out[:97, 1] = torch.randn(97, 3, size), torch.randn(97, size)
    qkv, grad_out = qkv.to(dtype), grad_out.to(dtype)
    _, _, ours, _ = run(qkv, grad_out.flatten(1), bounds, row_key, 0.0)
    alone = run(qkv[:, :, 1:].contiguous(), grad_out[:, 1].contiguous(), bounds, row_key, 0.0)[2]
    assert alone.isfinite().all()
    assert torch.equal(ours[:, 1:], alone)
    assert ours[::2, 0].isnan().all()
    assert not ours[1].any()
