"""A product of the feed-forward and GELU, one after the other as the model has them, and in one kernel.

kernels/feed_forward.py is a candidate: what runs today is a product of the library and bias_gelu. The other products of
the feed-forward are the same either way and left out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from operators import bias_gelu_work
from step_model import Ceilings, operator_seconds

CONTENDERS = ("bert_fast", "epilogue", "pytorch")


def available() -> bool:
    """Whether the kernels run here: on compute capability 9.0 and 10.0, and under Triton's interpreter."""
    from bert_fast.kernels.feed_forward import CAPABILITIES

    if not torch.cuda.is_available():
        return True
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor in CAPABILITIES


def calls(config, tokens: int, dtype: torch.dtype, device: str, direction: str) -> dict[str, Callable[[], object]]:
    """contender -> a function that runs ``direction``: z and GELU(z + b) from x; or d z and d b from d out.

    PyTorch's adds the bias in the product.
    """
    from bert_fast.kernels import bias_gelu, feed_forward

    hidden, columns = config.hidden_size, config.intermediate_size
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    bias = draw(columns)
    if direction == "forward":
        x, weight = draw(tokens, hidden), draw(columns, hidden, scale=hidden**-0.5)

        def apart():
            z = F.linear(x, weight)
            return z, bias_gelu.bias_gelu_fwd(z, bias)

        def pytorch():
            u = F.linear(x, weight, bias)
            return u, F.gelu(u)

        return {"bert_fast": apart, "epilogue": lambda: feed_forward.product_gelu(x, weight, bias), "pytorch": pytorch}
    grad_out, z = draw(tokens, hidden), draw(tokens, columns)
    weight = draw(hidden, columns, scale=hidden**-0.5)
    u = z + bias

    def pytorch_backward():
        grad_z = torch.ops.aten.gelu_backward(grad_out @ weight, u)
        return grad_z, grad_z.sum(dim=0)

    return {
        "bert_fast": lambda: bias_gelu.bias_gelu_bwd(grad_out @ weight, z, bias),
        "epilogue": lambda: feed_forward.product_gelu_bwd(grad_out, weight, z, bias),
        "pytorch": pytorch_backward,
    }


def work(config, tokens: int, direction: str, contender: str, element: int) -> dict[str, int]:
    """FLOPs of the product, and the bytes that a contender cannot do without."""
    hidden, columns = config.hidden_size, config.intermediate_size
    moved = element * (tokens * hidden + hidden * columns + 2 * tokens * columns)
    if contender != "epilogue":  # the product's result written and read
        moved += bias_gelu_work(config, [tokens], element, element)[direction].bytes - element * tokens * columns
    return {"flops": 2 * tokens * hidden * columns, "bytes": moved}


def predicted_ms(config, tokens: int, direction: str, ceilings: Ceilings) -> float:
    """Of the product and bias_gelu one after the other."""
    product = 2 * tokens * config.hidden_size * config.intermediate_size / ceilings.matmul + ceilings.between_kernels
    return 1e3 * (product + operator_seconds(config, [tokens], "bias_gelu", direction, ceilings))
