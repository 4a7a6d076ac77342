"""residual_layernorm on a CPU: not in C++ yet, the reference serves."""

from ...reference import residual_layernorm_bwd, residual_layernorm_fwd

__all__ = ["residual_layernorm_bwd", "residual_layernorm_fwd"]
