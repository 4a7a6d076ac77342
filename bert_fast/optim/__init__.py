"""AdamW and LAMB, fused: all parameters in the fewest passes over memory, decided on the device.

    optimizer = bert_fast.optim.Lamb(bert_fast.optim.parameter_groups(model), lr=2e-3, max_grad_norm=1.0)

A step is: the norm of all gradients (one read of them), then AdamW's update, or LAMB's moments and norms and then its
update, each in one launch for all param groups with the same betas and eps. Clipping is a factor inside the update. A
norm that is not finite changes nothing: weights, moments and steps stay, and ``skipped`` counts one more; nothing waits
for the device to decide that. Which implementation runs is bert_fast/dispatch.py's row ``optimizer``;
bert_fast/optim/reference.py has the formulas and their sources.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from bert_fast import dispatch

Tensor = torch.Tensor

__all__ = ["AdamW", "Lamb", "grad_norm", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict]:
    """``model``'s trainable parameters in two groups: with ``weight_decay``, and without it.

    Vectors (biases, LayerNorm's weights) do not decay, as in BERT's own optimiser. An empty group is left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all gradients of ``parameters``, () float32 on their device; 0 where there is none."""
    parameters = list(parameters)
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    _check(grads)
    return _run("norm", grads, grads)


def _check(grads: list[Tensor]) -> None:
    """Refuses gradients that no backend takes; nothing has been changed by then."""
    device = grads[0].device
    for grad in grads:
        if grad.layout != torch.strided:
            raise RuntimeError("bert_fast.optim takes no sparse gradients: build the embedding with sparse=False")
        if grad.device != device:
            raise ValueError(f"bert_fast.optim: gradients lie on {device} and on {grad.device}; one device is needed")


def _has_float64(tensors: list[Tensor]) -> bool:
    return torch.float64 in {t.dtype for t in tensors}


def _run(function: str, like: list[Tensor], *args):
    """``optimizer_<function>`` of the backend for the device of ``like``; float64 is the reference's."""
    device = like[0].device
    if _has_float64(like):
        from bert_fast.optim import reference

        return getattr(reference, f"optimizer_{function}")(*args)
    implementation = dispatch.implementation("optimizer", function, device.type)
    if device.type != "cuda":
        return implementation(*args)
    with torch.cuda.device(device):  # kernels are launched on the current device, which may be another
        return implementation(*args)


_Group = tuple[dict, list[Tensor]]  # a param group, and those of its parameters that have gradients


def _together(groups: Iterable[_Group]) -> list[list[_Group]]:
    """``groups`` dealt into those that share an update; those without a parameter are left out.

    A launch has one pair of betas and one eps; learning rate and weight decay are each parameter's own. A group with
    float64 in it stays alone: the reference, which has no launches, takes the whole of it.
    """
    found: dict[tuple, list[_Group]] = {}
    for number, (group, params) in enumerate(groups):
        if params:
            alone = number if _has_float64(params) else None
            found.setdefault((*group["betas"], group["eps"], alone), []).append((group, params))
    return list(found.values())


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _mark(p: Tensor) -> tuple[int, int]:
    """Differs from an earlier one where ``p`` was written to or replaced in between."""
    return p._version, p.data_ptr()


class _Fused(torch.optim.Optimizer):
    """What AdamW and LAMB share: state, clipping, the decision to skip, the table of rates."""

    _OWN: tuple[str, ...] = ("max_grad_norm", "bias_correction", "grad_norm", "skipped")

    def __init__(self, params, lr, betas, eps, weight_decay, max_grad_norm, bias_correction):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and not value >= 0:
                raise ValueError(f"{type(self).__name__}: {name} is {value}, expected 0 or more")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"{type(self).__name__}: betas are {betas}, expected two numbers from 0 to below 1")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{type(self).__name__}: max_grad_norm is {max_grad_norm}, expected above 0, or None")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.max_grad_norm, self.bias_correction = max_grad_norm, bias_correction
        # a sharded optimiser may own no parameter at all
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._written: dict[Tensor, tuple[int, int]] = {}  # 16-bit parameter -> _mark at its last update

    def __getstate__(self) -> dict:
        """For copies: what torch.optim.Optimizer gives, and this class's own; that the copy wrote nothing yet."""
        own = {key: self.__dict__[key] for key in self._OWN}
        return super().__getstate__() | own | {"_written": {}}

    @torch.no_grad()
    def step(self, closure=None, *, grad_norm: Tensor | None = None):
        """One update; returns ``closure()``'s loss, where one is given.

        ``grad_norm`` () is the norm to clip by and to decide by, where these parameters are only a part (an
        optimiser sharded over processes); by default the norm of their own gradients. Parameters without a gradient
        are left alone. Raises RuntimeError for sparse gradients, TypeError for dtypes other than float16, bfloat16,
        float32 and float64, ValueError for parameters on several devices or not contiguous and for a loaded state of
        other shapes; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        trained = [p for _, params in groups for p in params]
        if not trained:
            return loss
        grads = [p.grad for p in trained]
        _check([*grads, *trained])
        states = {p: self._state_of(p) for p in trained}
        norm = _run("norm", grads, grads) if grad_norm is None else grad_norm.detach()
        self.grad_norm = norm.to(trained[0].device)
        self.skipped = skipped = self.skipped.to(self.grad_norm.device)
        for together in _together(groups):
            self._update(together, states, skipped)
            skipped = None  # it is counted once
        return loss

    def _update(self, groups: list[_Group], states_of: dict[Tensor, dict], skipped: Tensor | None) -> None:
        """Updates ``groups`` that go together."""
        params = [p for _, members in groups for p in members]
        states = [states_of[p] for p in params]
        betas, eps = groups[0][0]["betas"], groups[0][0]["eps"]
        exact = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        rates, clip = _run(
            "rates", params, self._steps(states, params), self.grad_norm, skipped,
            [(len(members), group["lr"], group["weight_decay"]) for group, members in groups],
            betas if self.bias_correction else None, self.max_grad_norm,
        )  # fmt: skip
        function, extra = self._function()
        _run(
            function, params, params, [state.get("master", p) for state, p in zip(states, params, strict=True)],
            [cast(Tensor, p.grad).to(p.dtype).contiguous() for p in params], [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states], rates.to(exact), clip.to(exact), *betas, eps, *extra,
        )  # fmt: skip
        torch.autograd.graph.increment_version(params)  # kernels write past autograd, which must refuse old graphs
        self._written.update((p, _mark(p)) for p in params if p.dtype in _SIXTEEN_BITS)

    def _state_of(self, p: Tensor) -> dict:
        """The state of ``p`` where ``p`` is now, in the dtypes that its updates need."""
        name = f"{type(self).__name__}: a parameter of shape {tuple(p.shape)}"
        if not p.is_contiguous():
            raise ValueError(f"{name} is not contiguous: store it with .contiguous()")
        if p.dtype not in (*_SIXTEEN_BITS, torch.float32, torch.float64):
            raise TypeError(f"{name} has dtype {p.dtype}, expected float16, bfloat16, float32 or float64")
        exact = torch.float64 if p.dtype == torch.float64 else torch.float32
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=exact, memory_format=torch.contiguous_format)
        for key in ("exp_avg", "exp_avg_sq", "master"):  # the model may have been moved, converted, or a state loaded
            if key in state:
                if state[key].shape != p.shape:
                    raise ValueError(f"{name} has a state {key} of shape {tuple(state[key].shape)}: not its own")
                state[key] = state[key].to(device=p.device, dtype=exact).contiguous()
        if p.dtype not in _SIXTEEN_BITS:
            state.pop("master", None)
        elif "master" not in state:
            state["master"] = p.detach().float()
        elif self._written.get(p) != _mark(p):
            # Others wrote to p, to load weights say. Where that is the master's rounding the master keeps its bits.
            master = state["master"]
            master.copy_(torch.where(master.to(p.dtype) == p, master, p))
        return state

    def _steps(self, states: list[dict], params: list[Tensor]) -> Tensor:
        """The step counts of ``states`` as one vector (n,) float32 that their entries are views of."""
        base = states[0]["step"]._base
        linked = (
            base is not None
            and base.numel() == len(states)
            and all(
                state["step"]._base is base and state["step"].storage_offset() == i for i, state in enumerate(states)
            )
        )
        if not linked:
            base = torch.stack([state["step"].to(params[0].device) for state in states])
            for i, state in enumerate(states):
                state["step"] = base[i]
        return base

    def _function(self) -> tuple[str, tuple]:
        raise NotImplementedError

    def state_dict(self) -> dict:
        """As torch.optim.Optimizer's; step counts are tensors of their own."""
        found = super().state_dict()
        found["state"] = {
            number: state | {"step": state["step"].clone()} if "step" in state else state
            for number, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim.Optimizer's; moments, masters and steps keep their float32 for 16-bit parameters too."""
        super().load_state_dict(state_dict)
        self._written.clear()
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)


class AdamW(_Fused):
    """AdamW: decoupled weight decay, bias correction (``bias_correction=False``: as in BERT's own optimiser, without).

    ``params`` are parameters or groups (see :func:`parameter_groups`), float32, or bfloat16 and float16 with float32
    master weights in the state; ``lr`` a float or a device's tensor (), ``max_grad_norm`` the global L2 norm that
    gradients are clipped to. ``grad_norm`` () is the norm before clipping of the last step, ``skipped`` () int64 the
    number of steps that were left out because it was not finite.

    Source: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        bias_correction: bool = True,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, max_grad_norm, bias_correction)

    def _function(self) -> tuple[str, tuple]:
        return "adamw", ()


class Lamb(_Fused):
    """LAMB; arguments as AdamW's.

    ``variant="published"``: as in the paper, and as its authors' code has it, parameters without weight decay (bias
    and LayerNorm) take the plain step: no trust ratio. ``variant="nvidia"``: gradients are clipped to a global norm
    first (1.0 unless ``max_grad_norm`` says otherwise) and every parameter has a trust ratio.

    Source: Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020;
    S. Sreenivas et al., "Pretraining BERT with Layer-wise Adaptive Learning Rates", NVIDIA, 2019.
    """

    _OWN = (*_Fused._OWN, "variant")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        bias_correction: bool = True,
        variant: str = "published",
    ):
        if variant not in ("published", "nvidia"):
            raise ValueError(f"Lamb: variant is {variant!r}, expected 'published' or 'nvidia'")
        if variant == "nvidia" and max_grad_norm is None:
            max_grad_norm = 1.0
        super().__init__(params, lr, betas, eps, weight_decay, max_grad_norm, bias_correction)
        self.variant = variant

    def _function(self) -> tuple[str, tuple]:
        return "lamb", (self.variant == "nvidia",)
