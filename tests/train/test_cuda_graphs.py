"""What a recorded function owns: the tables that its kernels read live as long as it does, and no longer."""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bert_fast import dispatch, graph_memory, optim
from tests.support.parity import DEVICE
from tests.support.recorded_runs import Rerun

pytest.importorskip("triton")
if DEVICE == "cuda":
    pytest.skip("a GPU has CUDA graphs (tests/train/test_captured_step.py)", allow_module_level=True)

from bert_fast.kernels import optimizer as kernels


class Addresses(Rerun):
    """What is recorded keeps no tensor alive, as a graph does not."""

    def _recorded(self, function):
        function()
        return lambda: None


@pytest.fixture
def tables(monkeypatch) -> list[weakref.ref]:
    """Those that the optimiser's kernels were given, cached or made for it."""
    found = []

    def watched(make, *args):
        given = make(*args)
        found.extend(weakref.ref(t) for t in tree_leaves(given))
        return given

    for make in (kernels._table, kernels._plan):
        monkeypatch.setattr(kernels, make.__name__, functools.partial(watched, make))
    return found


def overflow_caches(make_table=kernels._table, make_plan=kernels._plan) -> None:
    for number in range(65):
        make_table(((number,),), torch.device("cpu"))
        make_plan((number,), 2048, torch.device("cpu"))
    gc.collect()


@pytest.mark.parametrize("fails", [False, True])
def test_tables_live_as_long_as_the_recording_that_reads_them(tables, fails):
    """Those that the caches had before it too, which others push out. A replay that reads them is waited for."""
    weights = [torch.nn.Parameter(torch.randn(n)) for n in (3, 5)]
    optimizer, recorder, recording, waited = optim.Lamb(weights), Addresses(weights), None, []
    recorder._wait = lambda: waited.append(all(table() is not None for table in tables))

    def update(fails: bool) -> None:
        for w in weights:
            w.grad = torch.randn_like(w)
        optimizer.step()
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    with dispatch.use_backend(optimizer="triton"):
        update(fails=False)
        tables.clear()
        with pytest.raises(RuntimeError, match="not permitted") if fails else contextlib.nullcontext():
            recording = recorder.record(lambda: update(fails))
    overflow_caches()
    assert len(tables) > 5
    assert fails or all(table() is not None for table in tables)
    del recording
    gc.collect()
    assert waited == [True] * (not fails)
    assert all(table() is None for table in tables)


def test_what_a_graph_of_others_reads_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(graph_memory, "_of_others", [])
    assert graph_memory.recording(torch.device("cuda"))
    assert not graph_memory.recording(torch.device("cpu"))
    table = torch.zeros(3)
    kept = weakref.ref(table)
    graph_memory.keep([table])
    with graph_memory.owned_by([]):
        graph_memory.keep([torch.ones(3)])
    del table
    gc.collect()
    assert kept() is not None
    assert len(graph_memory._of_others) == 1
