"""residual_layernorm with the fused LayerNorm of NVIDIA's apex (https://github.com/NVIDIA/apex), to compare with.

Asked for by name: ``bert_fast.set_backend(residual_layernorm="apex")``. apex fuses the LayerNorm alone, so
bias, dropout (this engine's mask) and residual are PyTorch operations before it.
"""

import importlib
import importlib.util
import pathlib

import torch

from bert_fast.reference import _drop_hidden

Tensor = torch.Tensor


def why_unavailable() -> str | None:
    """Why NVIDIA's apex cannot run here, or None where it can."""
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return "the package apex is not installed"
    # By its folder: importing PyPI's apex to look inside would run a web framework.
    if not any((pathlib.Path(folder) / "normalization").is_dir() for folder in apex.submodule_search_locations or ()):
        return "the installed apex is PyPI's package of that name, an unrelated project, not NVIDIA's"
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return "NVIDIA's apex is installed without its CUDA extensions (build it with --cuda_ext)"
    if not torch.cuda.is_available():
        return "apex needs a GPU, and none is visible to torch"
    return None


def _kernels():
    return importlib.import_module("fused_layer_norm_cuda")


def residual_layernorm_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    eps: float,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. apex normalises z as rounded to the residual's dtype, with parameters in it."""
    dtype = x.dtype if residual is None else residual.dtype
    z = x.float() if bias is None else x.float() + bias.float()
    z = _drop_hidden(z, row_key, rng_key, p, site)
    z = (z if residual is None else z + residual.float()).to(dtype)
    out, mean, rstd = _kernels().forward_affine(z, z.shape[1:], weight.to(dtype), ln_bias.to(dtype), eps)
    return out, z, mean, rstd


def residual_layernorm_bwd(
    grad_out: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    p: float,
    site: int,
    x_dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. apex reads neither the values of the bias nor eps where it is given z."""
    cast = weight.to(z.dtype)
    grad_z, grad_weight, grad_ln_bias = _kernels().backward_affine(
        grad_out, mean, rstd, z, z.shape[1:], cast, torch.zeros_like(cast), 0.0, False
    )
    same = p == 0.0 and x_dtype == z.dtype
    grad_x = grad_z if p == 0.0 else _drop_hidden(grad_z.float(), row_key, rng_key, p, site)
    return (
        z.new_empty(0, z.shape[1]) if same else grad_x.to(x_dtype),
        grad_z,
        grad_x.sum(dim=0, dtype=torch.float32).to(weight.dtype) if has_bias else weight.new_empty(0),
        grad_weight.to(weight.dtype),
        grad_ln_bias.to(weight.dtype),
    )
