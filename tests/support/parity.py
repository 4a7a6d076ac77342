"""How tests compare: against float64, and against what PyTorch itself loses in the same dtype."""

import torch

from bert_fast import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def available_backends(operator: str) -> list[str]:
    """The backends of ``operator`` that can run here on tensors of DEVICE and are ours to test (peers are not)."""
    ours = ("triton", "cpu", "reference") if DEVICE == "cpu" else ("triton", "reference")
    return [b for b in ours if b in dispatch.TABLE[operator] and dispatch.why_unavailable(b) is None]


def assert_near_truth(what, ours, same_dtype, truth, *, factor: float = 1.5, floor: float = 2.0) -> None:
    """The largest error of ``ours`` against ``truth`` (float64) is at most ``factor`` times that of
    ``same_dtype`` (PyTorch's own result in the dtype of ours) plus ``floor`` units in the last place of the
    largest true element. Shapes and dtypes must agree, and nothing may be NaN.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == same_dtype.dtype, f"{what}: dtype {ours.dtype}, expected {same_dtype.dtype}"
    if truth.numel() == 0:
        return
    error = (ours.double() - truth).abs()
    assert not error.isnan().any(), f"{what}: {int(error.isnan().sum())} of {error.numel()} elements are NaN"
    ulp = torch.finfo(ours.dtype).eps * float(truth.abs().max())
    bound = factor * float((same_dtype.double() - truth).abs().max()) + floor * ulp
    worst = int(error.argmax())
    assert float(error.max()) <= bound, (
        f"{what}: error {float(error.max()):.3e} at flat index {worst} (ours {float(ours.flatten()[worst]):.6g}, "
        f"truth {float(truth.flatten()[worst]):.6g}), bound {bound:.3e}"
    )
