"""The operators as PyTorch sees them: what every file of bert_fast/ops/ is made of. Nothing here computes.

Each operator is two torch.library operators, ``bert_fast::<name>_fwd`` and ``bert_fast::<name>_bwd``, so that
autograd, fake tensors and torch.compile see through it; bert_fast/dispatch.py says which implementation runs.
"""

import torch

from bert_fast import dispatch, reference

Tensor = torch.Tensor

library = torch.library.Library("bert_fast", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)


def define(operator: str, direction: str, schema: str, fake, check=None, only=None, tags=()) -> None:
    """Registers ``bert_fast::<operator>_<direction>``: ``fake`` gives its shapes, ``check`` reads values on a CPU.

    ``only(direction)`` is its one implementation, where backends have no choice of it; ``tags`` are
    torch.Tag's that it has besides TAGS.
    """
    name = f"{operator}_{direction}"

    def run(*args):
        device = args[0].device
        if check is not None and device.type == "cpu":
            check(*args)
        # One of the first four has the operator's dtype; not one element: a loss's gradient may have another.
        float64 = any(isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel() != 1 for x in args[:4])
        if only is not None:
            implementation = only(direction)
        else:
            implementation = dispatch.implementation(operator, direction, device.type, float64)
        # Autocast chose the inputs' dtypes; inside it would round what implementations widen, to sum it in float32.
        with torch._C._DisableAutocast():
            if device.type != "cuda" or torch.cuda.current_device() == device.index:
                return implementation(*args)
            with torch.cuda.device(device):  # kernels are launched on the current device, which is another
                return implementation(*args)

    library.define(f"{name}{schema}", tags=(*TAGS, *tags))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bert_fast::{name}", fake, lib=library)


def call(name: str, *args):
    """The operator ``name``; past what autograd does for it, where that is nothing."""
    operator = getattr(torch.ops.bert_fast, name).default
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


nodes: dict[str, type[torch.autograd.Function]] = {}


def differentiate(operator: str, setup_context, backward) -> None:
    """Gives ``<operator>_fwd`` the derivative ``backward``, of its first output; the others are for that alone.

    Twice: registered for the operator, as torch.compile and exports want it, and as a node of autograd that calls the
    operator, which costs the host a third of what a registered derivative does.
    """

    def setup(ctx, inputs, output):
        # Zeros in the place of the gradients of what the backward alone reads, among them a whole word table's, would
        # be written in every step.
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"bert_fast::{operator}_fwd", backward, setup_context=setup, lib=library)

    def node_forward(ctx, *inputs):
        output = call(f"{operator}_fwd", *inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return output[0] if isinstance(output, tuple) else output

    methods = {"forward": staticmethod(node_forward), "backward": staticmethod(backward)}
    nodes[operator] = type(operator, (torch.autograd.Function,), methods)

    def setup_bwd(ctx, inputs, output):
        pass

    def double_backward(ctx, *grads):
        raise NotImplementedError(
            f"bert_fast: {operator} has no second derivative; for gradient penalties and Hessians take derivatives by "
            "torch.func, run the model of transformers, or bert_fast.reference in place of the operator"
        )

    torch.library.register_autograd(f"bert_fast::{operator}_bwd", double_backward, setup_context=setup_bwd, lib=library)


# Whether a transform of torch.func (grad, vmap, jvp, ...) is at work. Operators are then the reference's plain PyTorch,
# which all of them take, and which has derivatives of any order.
transformed = torch._C._are_functorch_transforms_active


def first_output(operator: str, *inputs) -> Tensor:
    """The first output of ``<operator>_fwd``, differentiable."""
    if transformed():
        with torch._C._DisableAutocast():
            output = getattr(reference, f"{operator}_fwd")(*inputs)
        return output[0] if isinstance(output, tuple) else output
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return nodes[operator].apply(*inputs)
    output = call(f"{operator}_fwd", *inputs)
    return output[0] if isinstance(output, tuple) else output


def total_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
