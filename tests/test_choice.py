"""The one means by which candidates are tried: in use for a block, nested, and counted where their kernels serve."""

import contextlib
import importlib.util

import pytest
import torch

from bert_fast import choice, dispatch, ops

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_what_is_in_use_ends_with_its_block():
    default = {"a": 1, "b": 2}
    assert choice.of("name", default) is default
    assert not choice.active()
    with choice.use({"name": {"b": 3}}) as outer:
        choice.served("kernel")
        with contextlib.suppress(KeyError), choice.use({"name": {"a": 4}, "other": {}}) as inner:
            assert choice.of("name", default) == {"a": 4, "b": 2}
            choice.served("kernel")
            raise KeyError
        assert choice.of("name", default) == {"a": 1, "b": 3}
        assert (outer["kernel"], inner["kernel"]) == (2, 1)
    assert choice.of("name", default) is default
    choice.served("kernel")
    assert (default, outer["kernel"]) == ({"a": 1, "b": 2}, 2)


@needs_triton
def test_a_launch_configuration_is_what_a_kernel_is_launched_with():
    with dispatch.use_backend(bias_gelu="triton"):
        x, bias = torch.randn(3, 24), torch.randn(24)
        expected = ops.bias_gelu(x, bias)
        with choice.use({"bias_gelu.fwd": {"BLOCK_M": 2, "num_warps": 1}}):
            assert torch.equal(ops.bias_gelu(x, bias), expected)
        with choice.use({"bias_gelu.fwd": {"BLOCK_M": 0}}), pytest.raises(ZeroDivisionError):
            ops.bias_gelu(x, bias)


def test_how_many_logits_exist_at_a_time_can_be_chosen():
    hidden, word, bias = torch.randn(9, 16), torch.randn(40, 16), torch.randn(40)
    labels = torch.randint(40, (9,))
    whole = ops.mlm_loss(hidden, word, bias, labels)
    with choice.use({"mlm_loss.chunk": {"cpu": 0}}), pytest.raises(ValueError, match="chunk is 0"):
        ops.mlm_loss(hidden, word, bias, labels)
    with choice.use({"mlm_loss.chunk": {"cpu": 2}}):
        torch.testing.assert_close(ops.mlm_loss(hidden, word, bias, labels), whole)
