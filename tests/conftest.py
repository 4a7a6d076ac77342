"""Set-up of every test: Triton's interpreter where there is no GPU, and NaN in all memory not yet written."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # acts when a kernel is decorated, so before any import of bert_fast

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from bert_fast.interpreter import correct

    correct()


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(20181011)


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory():
    """torch.empty and its relatives give NaN (or the largest integer), so an element no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
