"""A recorded step is its operations alone: replayed without any of its Python, they give the bits of eager steps.

Triton's kernels run by their interpreter, as they would in a CUDA graph: with the arguments that they were given once.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig

from bert_fast import dispatch
from tests.support.parity import DEVICE
from tests.train import test_captured_step as steps

pytest.importorskip("triton")
if DEVICE == "cuda":
    pytest.skip("a GPU has CUDA graphs (tests/train/test_captured_step.py)", allow_module_level=True)

from tests.support.recorded_operations import Replay

# plain PyTorch shows its operations, too; its attention alone reads lengths on the host, and would wait for a GPU
ATTENTION = {"attention": "triton"}
KERNELS = dict.fromkeys(dispatch.TABLE, "triton")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Every kind of function recorded, and replayed with another rate, other masks and counts than it was recorded."""
    monkeypatch.setattr(steps, "UPDATES", (1, 3, 1, 4))
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
        max_position_embeddings=steps.LONGEST,
    )  # fmt: skip
    monkeypatch.setattr(steps, "CONFIG", config)


def prepared(recompute: str = "nothing", tell=pytest.fail, **options):
    step = steps.build(recorder=Replay, tell=tell, **options)
    step.model.recompute(recompute)
    return steps.prepare(step)


@pytest.mark.parametrize(
    ("backends", "recompute", "options"),
    [
        (ATTENTION, "nothing", {"kind": "Lamb", "bf16": True}),
        *(
            pytest.param(KERNELS, *rest, marks=pytest.mark.slow)
            for rest in (
                ("nothing", {"kind": "AdamW"}),
                ("gelu", {"kind": "Lamb", "bf16": True}),
                ("layers", {"kind": "Lamb", "dtype": torch.bfloat16}),
            )
        ),
    ],
)
def test_the_same_bits_as_eager(backends, recompute, options):
    with dispatch.use_backend("reference", **backends):
        expected = [t.float() for t in steps.trained(steps.build(**options))]
        step = prepared(recompute, **options)
        assert steps.same([t.float() for t in steps.trained(step)], expected)
    assert step.captured == 4  # a whole update of one size; first, middle and last of the other
    assert "_attention_bwd_dkv_kernel" in step.recorder.replayed
    assert float(step.optimizer.skipped) == 0


def test_weights_that_are_loaded_between_replays_are_trained(monkeypatch):
    """In 16 bits they have masters, from which a graph would write the old ones back."""
    monkeypatch.setattr(steps, "UPDATES", (1, 1))
    found = []
    with dispatch.use_backend("reference", **ATTENTION):
        for step in (steps.build(dtype=torch.bfloat16), prepared(dtype=torch.bfloat16)):
            steps.trained(step)
            torch.manual_seed(7)
            step.model.load_state_dict({k: v + torch.randn_like(v) for k, v in step.model.state_dict().items()})
            found.append([t.float() for t in steps.trained(step)])
    assert step.captured == 2
    assert steps.same(*found)


def test_what_is_decided_on_the_host_is_found():
    """Recorded, the plain attention goes over the lengths of the batch that it was recorded with."""
    with dispatch.use_backend("reference"):
        expected = steps.trained(steps.build())
        step = prepared()
        found = steps.trained(step)
    assert step.captured == 4
    assert steps.same(found[:2], expected[:2])  # the first update of a size is the one that is recorded
    assert not steps.same(found, expected)


def test_what_is_left_in_the_pool_is_found(monkeypatch):
    """A layer's output that the graph of the next micro-batch reads: on a GPU it may be written over before."""
    monkeypatch.setattr(steps, "UPDATES", (1, 1, 2))

    def keeping(step):
        kept = []

        def hook(module, given, out):
            kept.append(out.detach())
            return out + 0 * kept[-2] if len(kept) > 1 and kept[-2].shape == out.shape else out

        step.model.bert.encoder.layer[0].output.register_forward_hook(hook)
        return step

    with dispatch.use_backend("reference", **ATTENTION):
        expected = steps.trained(keeping(steps.build()))
        found = steps.trained(keeping(prepared()))
    assert all(t.isfinite().all() for t in expected)
    assert not all(t.isfinite().all() for t in found)


def test_what_would_wait_for_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(steps, "UPDATES", (1, 1))

    def waiting(step):
        layer = step.model.bert.encoder.layer[0].output
        layer.register_forward_hook(lambda module, given, out: out * (1.0 if float(out.detach().sum()) < 1e9 else 0.0))
        return step

    told = []
    with dispatch.use_backend("reference", **ATTENTION):
        expected = steps.trained(waiting(steps.build()))
        step = prepared(tell=told.append)
        assert steps.same(steps.trained(waiting(step)), expected)
    (message,) = told
    assert "could not be recorded as a CUDA graph: RuntimeError: operation not permitted" in message
    assert step.recorder is None


def test_tensors_without_memory_do_not_keep_a_step_from_being_recorded():
    """torch.compile, torch.export and torch.func leave such behind."""
    left = []

    def keep(x):
        left.append(x)
        return x.sum()

    with FakeTensorMode():
        left.append(torch.empty(3))
    torch.func.grad(keep)(torch.ones(3))
    torch.func.vmap(keep)(torch.ones(2, 3))
    total = torch.zeros(2)
    Replay([]).record(lambda: total.add_(1))()
    assert total.tolist() == [1, 1]
