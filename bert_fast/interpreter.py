"""Triton's interpreter (TRITON_INTERPRET=1), corrected: bfloat16 as the hardware computes it, and with NumPy of today.

The interpreter keeps bfloat16 as its 16 bits in unsigned integers. In Triton 3.6 to 3.9 three of its steps are
wrong: ``tl.dot`` multiplies the bit patterns as integers, arithmetic and comparisons of two bfloat16 blocks do the
same, and a cast from float32 (so every store) cuts the lower bits off where hardware rounds to nearest even.
Triton 3.6 besides makes an integer of a scalar (the bound of a loop) in a way that NumPy 2.4 and later refuse.
Kernels are written for the hardware, so the interpreter is corrected, here and nowhere else; compiled kernels
never pass through this file. tests/test_interpreter.py fails when Triton no longer needs the bfloat16 part.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 bits -> the same values in float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16 bits, to nearest, ties to even; infinities and NaN stay what they are."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(values.shape)


def _is_bfloat16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _as_float32(handle):
    return interpreter.TensorHandle(_widen(handle.data), tl.float32) if _is_bfloat16(handle.dtype) else handle


class _Corrected(interpreter.InterpreterBuilder):
    def cast_impl(self, src, dst_type):
        src = _as_float32(src)
        if not _is_bfloat16(dst_type):
            return super().cast_impl(src, dst_type)
        return interpreter.TensorHandle(_round(src.data), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        # Asked for by name: rounding to nearest even is cast_impl's, rounding toward zero is the original's.
        nearest = rounding_mode is None or rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and (_is_bfloat16(src.dtype) or _is_bfloat16(dst_type)):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not _is_bfloat16(lhs.dtype) or op in _BITWISE:
            return super().binary_op(lhs, rhs, op)
        result = op(_widen(lhs.data), _widen(rhs.data))
        return interpreter.TensorHandle(result if result.dtype == np.bool_ else _round(result), tl.bfloat16)

    def create_dot(self, a, b, d, *options):
        return super().create_dot(_as_float32(a), _as_float32(b), d, *options)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))


def correct() -> None:
    """Correct Triton's interpreter in this process; a second call changes nothing."""
    if not isinstance(interpreter.interpreter_builder, _Corrected):
        interpreter.interpreter_builder.__class__ = _Corrected
        interpreter._patch_lang_tensor = _patch_tensor
