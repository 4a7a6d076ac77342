"""What an operator checks of its arguments, and says where they do not fit.

The public functions check what shapes, dtypes and devices tell; values (ids, labels, cu_seqlens) are checked on CPU
tensors when the operator runs, and never on a GPU, where that would wait for the device.
"""

import torch

Tensor = torch.Tensor


def require(condition: bool, operator: str, message: str, error=ValueError) -> None:
    """Raises ``error`` with ``message`` where the condition is false."""
    if not condition:
        raise error(f"bert_fast.{operator}: {message}")


def check_like(operator: str, device: torch.device, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Every tensor is on ``device`` and has its shape (-1: any size)."""
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"bert_fast.{operator}: {name} is on {tensor.device}, the other tensors on {device}: move it"
            )
        found = tensor.shape
        if found != shape and (
            len(found) != len(shape) or any(want not in (-1, have) for want, have in zip(shape, found, strict=True))
        ):
            expected = tuple("any" if n == -1 else n for n in shape)
            raise ValueError(f"bert_fast.{operator}: {name} has shape {tuple(found)}, expected {expected}")


_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_floating(operator: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATING:
            raise TypeError(f"bert_fast.{operator}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def dropout_keys(operator: str, p: float, row_key: Tensor | None, rng_key: Tensor | None, x: Tensor):
    """The checked keys of a mask over ``x``'s rows; empty tensors where nothing is dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"bert_fast.{operator}: the dropout probability p is {p}, expected 0 <= p <= 1")
    if p == 0.0:
        none = x.new_empty(0, dtype=torch.int64)
        return none, none
    if row_key is None or rng_key is None:
        raise ValueError(
            f"bert_fast.{operator}: dropout needs row_key (bert_fast.dropout_mask.row_keys) and rng_key "
            "(bert_fast.ops.draw_dropout_key)"
        )
    check_like(operator, x.device, rng_key=(rng_key, (1,)), row_key=(row_key, (x.shape[0],)))
    for name, key in (("rng_key", rng_key), ("row_key", row_key)):
        if key.dtype != torch.int64:
            raise TypeError(f"bert_fast.{operator}: {name} has dtype {key.dtype}, expected int64")
    return row_key.contiguous(), rng_key.contiguous()


def check_range(operator: str, name: str, values: Tensor, size: int, ignore: int | None = None) -> None:
    """Every value is in 0 .. size-1 (or ``ignore``). Reads the values: CPU tensors only."""
    if values.numel() == 0:
        return
    if int(values.min()) < 0 or int(values.max()) >= size:
        error = out_of_range(f"bert_fast.{operator}: {name}", values, size, ignore)
        if error is not None:
            raise error


def out_of_range(
    name: str, values: Tensor, size: int, ignore: int | None = None, among: Tensor | None = None
) -> IndexError | None:
    """The error that names the first of ``values`` (of any shape) outside 0 .. size-1 (and not ``ignore``), where
    ``among`` (bool, of that shape) is true; None where there is none."""
    bad = (values < 0) | (values >= size)
    if ignore is not None:
        bad &= values != ignore
    if among is not None:
        bad &= among
    if not bad.any():
        return None
    place = bad.nonzero()[0].tolist()
    allowed = f"0 .. {size - 1}" + ("" if ignore is None else f" or {ignore}")
    return IndexError(
        f"{name}[{', '.join(map(str, place))}] is {int(values[tuple(place)])}, allowed is {allowed} "
        f"({int(bad.sum())} of {values.numel()} are out of range)"
    )
