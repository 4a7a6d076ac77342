"""embedding_layernorm on a CPU: not in C++ yet, the reference serves."""

from ...reference import embedding_layernorm_bwd, embedding_layernorm_fwd

__all__ = ["embedding_layernorm_bwd", "embedding_layernorm_fwd"]
