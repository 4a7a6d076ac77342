"""attention on a CPU: not in C++ yet, the reference serves."""

from ...reference import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_fwd"]
