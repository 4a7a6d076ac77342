"""Code of one's own around and inside a BERT: it runs, it sees what transformers shows it, and the numbers are those of
transformers. Every module of every class, by name, so that none is forgotten."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.test_model import HEADS, MASKS, TOLERANCE, config, inputs_of, loss_of, mask_of, packed_of, pair, qa

INNER = ("bert.embeddings", "bert.encoder")
CONTAINERS = {
    "bert.embeddings", "bert.encoder", "bert.encoder.layer.0", "bert.encoder.layer.0.attention",
    "bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.attention.output",
    "bert.encoder.layer.0.intermediate", "bert.encoder.layer.0.output",
}  # fmt: skip


def first_of(value):
    return value if torch.is_tensor(value) else next((v for v in value if torch.is_tensor(v)), None)


class Effect:
    """What one's own code does to an output, and what it saw. ``mixes``: across positions, padding included."""

    def __init__(self, mixes: bool):
        self.mixes, self.seen = mixes, []

    def change(self, x):
        return 1.25 * x + (0.1 * x.mean(dim=1, keepdim=True) if self.mixes and x.dim() == 3 else 0.0)

    def __call__(self, output):
        if torch.is_tensor(output):
            self.seen.append(output.detach())
            return self.change(output)
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        for key in output:
            output[key] = self(output[key])
        return output

    def of_input(self, args, kwargs=None):
        if not args:  # transformers gives the embeddings keywords alone
            return args
        if args[0].is_floating_point():
            return (self(args[0]), *args[1:])
        self.seen.append(args[0])
        return args


class Wrapper(nn.Module):
    """An unrelated module in the place of another."""

    def __init__(self, inner, effect):
        super().__init__()
        self.inner, self.effect = inner, effect

    def forward(self, *args, **kwargs):
        return self.effect(self.inner(*args, **kwargs))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def forward_hook(model, name, module, effect):
    module.register_forward_hook(lambda m, args, output: effect(output))


def forward_pre_hook(model, name, module, effect):
    module.register_forward_pre_hook(lambda m, args: effect.of_input(args))


def forward_pre_hook_with_kwargs(model, name, module, effect):
    module.register_forward_pre_hook(lambda m, args, kw: (effect.of_input(args), kw), with_kwargs=True)


def backward_hook(model, name, module, effect):
    def hook(m, given, output):
        effect.seen.extend(g.detach() for g in output if g is not None)
        return tuple(g if g is None or not g.is_floating_point() else 1.5 * g for g in given)

    module.register_full_backward_hook(hook)


def patched_forward(model, name, module, effect):
    before = module.forward
    module.forward = lambda *args, **kwargs: effect(before(*args, **kwargs))


def subclass(model, name, module, effect):
    kind = type(module)
    module.__class__ = type("Own", (kind,), {"forward": lambda self, *a, **kw: effect(kind.forward(self, *a, **kw))})


def replaced(model, name, module, effect):
    put(model, name, Wrapper(module, effect))


def parametrized(model, name, module, effect):
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        parametrize.register_parametrization(module, "weight", Doubled())


def weight_normed(model, name, module, effect):
    if isinstance(module, nn.Linear):
        parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.data.mul_(1.5)


def pruned(model, name, module, effect):
    if isinstance(module, nn.Linear):
        torch.manual_seed(3)
        prune.random_unstructured(module, "weight", 0.5)


def compiled(model, name, module, effect):
    put(model, name, torch.compile(Wrapper(module, effect), backend="eager"))


HOOKS = (forward_hook, forward_pre_hook, forward_pre_hook_with_kwargs, backward_hook)
FORWARDS = (patched_forward, subclass, replaced, compiled)
SLOW = (forward_pre_hook, weight_normed, pruned, compiled)
TOUCHES = [
    pytest.param(touch, marks=pytest.mark.slow if touch in SLOW else (), id=touch.__name__)
    for touch in (*HOOKS, *FORWARDS, parametrized, weight_normed, pruned)
]


def small(name, **changes):
    return pair(name, num_hidden_layers=1, **qa(name), **changes)


def names_of(class_name, touch) -> list[str]:
    """The modules that code of one's own can be put on, of a head alone where its encoder is looked at elsewhere."""
    model = getattr(transformers, class_name)(config(num_hidden_layers=1))
    names = [n for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)]
    if touch in (replaced, compiled):  # transformers calls no such Dropout, it reads its p
        names = [n for n in names if not n.endswith("self.dropout")]
    if class_name == "BertModel":
        return [n for n in names if n.startswith("pooler")]
    return [n for n in names if class_name == "BertForPreTraining" or not n.startswith(INNER)]


def touched(touch, name, class_name, **changes):
    """Both models with the same code on the module ``name``, and the effects, which hold what they saw."""
    models = small(class_name, **changes)
    mixes = (touch in FORWARDS and name in CONTAINERS) or not name.startswith(INNER)
    effects = [Effect(mixes), Effect(mixes)]
    for model, effect in zip(models, effects, strict=True):
        touch(model, name, model.get_submodule(name), effect)
    return models, effects


def run(model, batch, training):
    model.train(training).zero_grad()
    output = model(**batch)
    if training:
        loss_of(output).backward()
    return output, [p.grad for p in model.parameters()]


def assert_same(got, expected, what):
    torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda m: f"{what}: {m}")


def assert_same_run(ours, reference, mask, what):
    (got, gradients), (expected, theirs) = ours, reference
    for key in expected:
        if key not in got:
            assert "logits" in key, (what, key)
            continue
        a, b = got[key], expected[key]
        if mask is not None and b.shape[:2] == mask.shape:
            a, b = (t.where(mask.bool().view(*mask.shape, *[1] * (t.dim() - 2)), 0.0) for t in (a, b))
        assert_same(a, b, f"{what}: {key}")
    for number, (a, b) in enumerate(zip(gradients, theirs, strict=True)):
        if b is None:
            assert a is None or not a.any(), what
        else:
            scale = max(1.0, float(b.abs().max()))
            assert_same(a / scale, b / scale, f"{what}: gradient {number}")


def unlabelled(batch):
    return {k: v for k, v in batch.items() if "label" not in k and not k.endswith("_positions")}


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("class_name", HEADS)
def test_code_of_ones_own_runs_and_sees_what_transformers_shows_it(class_name, touch):
    mask = mask_of("holes")
    batch = inputs_of(class_name, mask)
    names = names_of(class_name, touch)
    assert len(names) > 1 or class_name in ("BertForQuestionAnswering",)
    for name in names:
        (reference, ours), (theirs, effect) = touched(touch, name, class_name)
        for given, training in ((batch, True), (batch, False), (unlabelled(batch), False)):
            what = f"{name}, {'training' if training else 'evaluation'}"
            shape = None if class_name == "BertForMultipleChoice" else mask
            assert_same_run(run(ours, given, training), run(reference, given, training), shape, what)
        if (touch in FORWARDS and name in CONTAINERS) or not name.startswith(INNER):
            assert len(effect.seen) == len(theirs.seen), name
            for a, b in zip(effect.seen, theirs.seen, strict=True):
                assert_same(a, b, f"what was seen at {name}")
        elif theirs.seen and (touch is not backward_hook):
            assert effect.seen, name


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("class_name", ["BertForPreTraining", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_code_of_ones_own_and_packed_input(class_name, touch):
    """Each sequence alone: what a padded batch gives where nothing mixes padding in."""
    kind = "ones" if class_name == "BertForQuestionAnswering" else "right"  # whose loss reads the scores of padding
    lengths = MASKS[kind]
    batch = inputs_of(class_name, mask_of(kind))
    packed = packed_of(batch, lengths)
    packed.pop("attention_mask")
    packed |= {k: v for k, v in batch.items() if v.dim() == 1}
    for name in names_of(class_name, touch):
        (reference, ours), effects = touched(touch, name, class_name)
        for effect in effects:
            effect.mixes = False
        got, gradients = run(ours, packed, True)
        expected, theirs = run(reference, batch, True)
        assert_same_run(({"loss": got.loss}, gradients), ({"loss": expected.loss}, theirs), None, name)
