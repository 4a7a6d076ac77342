"""Code of one's own around and inside a BERT: it runs, it sees what transformers shows it, and the numbers are those of
transformers. Every module of every class, by name, so that none is forgotten."""

import concurrent.futures
import copy
import functools
import logging
import pickle
import threading

import accelerate
import peft
import pytest
import torch
import transformers
import transformers.modeling_outputs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import bert_fast
from tests.support.heads import HEADS, MASKS, TOLERANCE, config, inputs_of, loss_of, mask_of, packed_of, pair, qa
from tests.support.parity import DEVICE

INNER = ("bert.embeddings", "bert.encoder")
CONTAINERS = {
    "bert.embeddings", "bert.encoder", "bert.encoder.layer.0", "bert.encoder.layer.0.attention",
    "bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.attention.output",
    "bert.encoder.layer.0.intermediate", "bert.encoder.layer.0.output",
}  # fmt: skip


def first_of(value):
    values = value.values() if isinstance(value, dict) else [value] if torch.is_tensor(value) else value
    return next(v for v in values if torch.is_tensor(v))


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


# --------------------------------------------------------------------------------------------------------------
# Hooks on all modules, encoders, poolers and heads of one's own, and parts called directly


def test_hooks_on_all_modules_see_all_that_transformers_calls():
    reference, ours = small("BertForPreTraining")
    batch = inputs_of("BertForPreTraining", mask_of("holes"))
    runs = []
    for model in (reference, ours):
        seen = []

        def hook(module, args, output, seen=seen):
            seen.append((type(module).__name__, first_of(output).shape))

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            model(**batch)
        finally:
            handle.remove()
        runs.append(seen)
    assert runs[1] == [call for call in runs[0] if call[0] != "CrossEntropyLoss"]  # a loss is no part of the model
    assert ours.train()(**batch).prediction_logits is None  # and rows alone again where nobody looks on


class Encoder(nn.Module):
    """Unrelated to BERT."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.kind = nn.Embedding(61, 24), kind

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, return_dict=True, **kwargs):
        states = self.table(input_ids) * attention_mask[..., None]
        pooled = states.sum(1) / attention_mask.sum(1, keepdim=True)
        return (states, pooled) if self.kind is tuple else self.kind(last_hidden_state=states, pooler_output=pooled)


@pytest.mark.parametrize("kind", [tuple, transformers.modeling_outputs.BaseModelOutputWithPooling])
@pytest.mark.parametrize("class_name", [name for name in HEADS if name != "BertModel"])
def test_an_encoder_of_ones_own(class_name, kind):
    reference, ours = small(class_name)
    reference.bert = ours.bert = Encoder(transformers.modeling_outputs.BaseModelOutputWithPooling)
    batch = inputs_of(class_name, mask_of("left"))
    expected = run(reference, batch, True)
    ours.bert.kind = kind
    assert_same_run(run(ours, batch, True), expected, None if "Choice" in class_name else batch["attention_mask"], "")


def test_an_encoder_of_ones_own_leaves_the_forwards_of_other_threads_alone():
    """What is computed at padding within it is for it alone, also while it runs and where it raises."""
    _, ours = small("BertForTokenClassification")
    batch = inputs_of("BertForTokenClassification", mask_of("right"))
    batch.pop("labels")
    padding = batch["attention_mask"] == 0
    inside, other = threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        assert other.wait(60)
        raise RuntimeError("of one's own")

    watched = copy.deepcopy(ours)
    watched.bert.register_forward_hook(lambda module, args, output: None)
    watched.bert.embeddings.word_embeddings.register_forward_pre_hook(wait)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(watched, **batch)
        assert inside.wait(60)
        states = ours.bert(**batch).last_hidden_state
        other.set()
        assert states[padding].abs().max() == 0
        with pytest.raises(RuntimeError, match="of one's own"):
            running.result()
        assert pool.submit(ours.bert, **batch).result().last_hidden_state[padding].abs().max() == 0


class Averaging(nn.Module):
    """A BERT and code of one's own that reads padding; ``again``: the backward runs the BERT once more."""

    def __init__(self, bert, again, **options):
        super().__init__()
        self.bert, self.again, self.options = bert, again, options

    def forward(self, input_ids, attention_mask=None, **kwargs):
        def states_of(embeds):
            return self.bert(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state

        embeds = self.bert.get_input_embeddings()(input_ids)
        states = checkpoint(states_of, embeds, **self.options) if self.again else states_of(embeds)
        return (states + states.mean(dim=1, keepdim=True),)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_encoder_of_ones_own_that_is_run_again_in_the_backward(use_reentrant):
    _, ours = small("BertForTokenClassification")
    batch = inputs_of("BertForTokenClassification", mask_of("right"))
    models = [copy.deepcopy(ours), ours]
    for again, model in enumerate(models):
        model.bert = Averaging(model.bert, again, use_reentrant=use_reentrant)
    expected, got = (run(model, batch, True) for model in models)
    assert_same_run(got, expected, batch["attention_mask"], "again")


class MeanPooler(nn.Module):
    def __init__(self, pooler):
        super().__init__()
        self.dense = pooler.dense

    def forward(self, hidden_states):
        return torch.tanh(self.dense(hidden_states.mean(dim=1)))


def test_a_pooler_that_reads_more_than_the_first_token():
    reference, ours = small("BertForPreTraining")
    for model in (reference, ours):
        model.bert.pooler = MeanPooler(model.bert.pooler)
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    assert_same_run(run(ours, batch, True), run(reference, batch, True), batch["attention_mask"], "padded")
    ones = inputs_of("BertForPreTraining", mask_of("ones"))
    packed = packed_of(ones, MASKS["ones"]) | {"next_sentence_label": ones["next_sentence_label"]}
    packed.pop("attention_mask")
    expected = reference.eval()(**ones)
    assert_same(ours.eval()(**packed).seq_relationship_logits, expected.seq_relationship_logits, "packed")


@pytest.mark.parametrize("part", ["BertPooler", "BertLMPredictionHead", "BertPreTrainingHeads"])
def test_forwards_that_are_put_on_transformers_classes_run(part, monkeypatch):
    kind = getattr(transformers.models.bert.modeling_bert, part)
    before = kind.forward

    def mixing(self, states, *pooled):
        return before(self, states + states.mean(dim=1, keepdim=True), *pooled)

    reference, ours = small("BertForPreTraining")
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    plain = run(reference, batch, True)[0].loss
    monkeypatch.setattr(kind, "forward", mixing)
    expected = run(reference, batch, True)
    assert (expected[0].loss - plain).abs() > 1e-3
    assert_same_run(run(ours, batch, True), expected, batch["attention_mask"], part)


class OwnHeads(nn.Module):
    """Reads the whole sequence, and has none of transformers' names."""

    def __init__(self):
        super().__init__()
        self.words, self.order = nn.Linear(24, 61), nn.Linear(24, 2)

    def forward(self, sequence_output, pooled_output):
        return self.words(sequence_output + sequence_output.amax(1, keepdim=True)), self.order(pooled_output)


class OwnPreTraining(bert_fast.BertForPreTraining):
    def __init__(self, config):
        super().__init__(config)
        self.cls = OwnHeads()

    def get_input_embeddings(self):
        return self.bert.embeddings.word_embeddings

    def forward(self, *args, scale=1.0, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = scale * output.loss
        return output


def test_a_subclass_with_heads_of_its_own():
    reference, _ = small("BertForPreTraining")
    ours = OwnPreTraining(config(num_hidden_layers=1))
    reference.cls = ours.cls
    ours.bert.load_state_dict(reference.bert.state_dict())
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    expected, got = reference(**batch), ours(**batch, scale=2.0)
    assert_same(got.loss, 2 * expected.loss, "loss")
    assert_same(got.seq_relationship_logits, expected.seq_relationship_logits, "order")


def test_parts_that_are_called_directly_are_those_of_transformers():
    reference, ours = small("BertForPreTraining")
    batch = inputs_of("BertForPreTraining")
    ids, segments = batch["input_ids"], batch["token_type_ids"]
    found = []
    for model in (reference, ours):
        embedded = model.bert.embeddings(input_ids=ids, token_type_ids=segments)
        states = model.bert.encoder(embedded).last_hidden_state
        layer = model.bert.encoder.layer[0]
        attended, _ = layer.attention(embedded)
        parts = layer.output(layer.intermediate(attended), attended)
        whole = model.bert(ids, token_type_ids=segments)
        found.append((embedded, states, parts, *whole.to_tuple(), *model.cls(states, model.bert.pooler(states))))
    for a, b in zip(found[1], found[0], strict=True):
        assert_same(a, b, "part")


def test_embeddings_and_decoders_that_are_replaced_or_resized():
    reference, ours = small("BertForMaskedLM")
    batch = inputs_of("BertForMaskedLM", mask_of("right"))
    torch.manual_seed(4)
    table, decoder = nn.Embedding(61, 24), nn.Linear(24, 61, bias=False)
    for model in (reference, ours):
        model.set_input_embeddings(Wrapper(table, Effect(False)))
    assert_same_run(run(ours, batch, True), run(reference, batch, True), batch["attention_mask"], "embeddings")
    for model in (reference, ours):
        model.set_input_embeddings(table)
        model.cls.predictions.decoder = decoder
    assert_same_run(run(ours, batch, True), run(reference, batch, True), batch["attention_mask"], "decoder")
    reference, ours = small("BertForMaskedLM")
    for model in (reference, ours):
        torch.manual_seed(5)
        model.resize_token_embeddings(70)
    assert_same_run(run(ours, batch, True), run(reference, batch, True), batch["attention_mask"], "resized")


@pytest.mark.parametrize("class_name", ["BertForPreTraining", "BertForTokenClassification"])
def test_a_model_quantised_for_a_cpu(class_name):
    reference, ours = small(class_name)
    batch = inputs_of(class_name, mask_of("right"))
    for model in (reference, ours):
        torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8, inplace=True)
    with torch.no_grad():
        expected, got = reference(**batch), ours(**batch)
    torch.testing.assert_close(got.loss, expected.loss, atol=0.05, rtol=0.05)  # scales are those of a batch's rows


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_own_forwards_inside_checkpointed_layers(use_reentrant):
    (reference, ours), _ = touched(replaced, "bert.encoder.layer.0.attention.output", "BertForMaskedLM")
    for model in (reference, ours):
        model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
    batch = inputs_of("BertForMaskedLM", mask_of("right"))
    assert_same_run(run(ours, batch, True), run(reference, batch, True), None, "checkpointed")


def test_hidden_states_and_attentions_through_a_part_of_ones_own():
    (reference, ours), _ = touched(patched_forward, "encoder.layer.0.output", "BertModel")
    for given in (inputs_of("BertModel", mask_of("right")), inputs_of("BertModel")):
        wanted = {"output_hidden_states": True, "output_attentions": True}
        expected, got = reference(**given, **wanted), ours(**given, **wanted)
        assert list(got) == list(expected)
        for key in ("hidden_states", "attentions"):
            for a, b in zip(got[key], expected[key], strict=True):
                assert_same(a, b, key)
    assert not any(m._forward_hooks for m in ours.modules())  # transformers' own, with which it records
    for name, changes in (("sdpa", {"output_attentions": True}), ("flash_attention_2", {})):
        ours.set_attn_implementation(name)
        with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"):
            ours(**given, **changes)


def trained_by_trainer(model, rows, folder, kind=transformers.Trainer, seed=7, **arguments):
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", report_to=[],
        save_strategy="no", use_cpu=DEVICE == "cpu", disable_tqdm=True, seed=seed, **arguments,
    )  # fmt: skip
    kind(model=model, args=arguments, train_dataset=rows).train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rows_of(batch) -> list[dict]:
    return [{k: v[i].cpu() for k, v in batch.items()} for i in range(len(batch["input_ids"]))]


@pytest.mark.parametrize("kind", ["ones", "right"])
def test_neftune_by_trainer_trains_with_its_noise(kind, tmp_path):
    """The noise is drawn for a dense batch, and its size is that of a dense batch: the same as in transformers."""
    reference, ours = small("BertForMaskedLM")
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    rows = rows_of(inputs_of("BertForMaskedLM", mask_of(kind)))
    expected = trained_by_trainer(reference, rows, tmp_path, neftune_noise_alpha=5.0)
    got = trained_by_trainer(ours, rows, tmp_path, neftune_noise_alpha=5.0)
    ours.load_state_dict(start, strict=False)
    without = trained_by_trainer(ours, rows, tmp_path)
    for name, value in expected.items():
        # transformers 5.23 leaves out what divides by the number of items, which Trainer passes
        assert_same(got[name] - start[name], value - start[name], name)
    assert any((got[name] - without[name]).abs().max() > 1e-4 for name in got)


# --------------------------------------------------------------------------------------------------------------
# A loss of one's own, in training


ABSENT = {"BertForPreTraining": "prediction_logits", "BertForMaskedLM": "logits"}


@pytest.fixture
def said(caplog):
    """What is said once in a process, as a list of messages."""
    logging.Logger.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if "return_logits" in record.getMessage()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("class_name", "name"), ABSENT.items())
def test_absent_logits_say_how_to_get_them(class_name, name, said):
    _, ours = small(class_name)
    batch = inputs_of(class_name)
    output = ours.train()(**batch)
    for read in (output, output, ours(**batch)):  # once in a loop, and no warning that a filter makes an error
        assert getattr(read, name) is None
    (message,) = said()
    assert f"outputs.{name} is None" in message
    assert "return_logits=True" in message
    with pytest.raises(KeyError, match="return_logits=True"):
        output[name]
    for number in (1, slice(2), slice(1, None)):
        with pytest.raises(IndexError, match="return_logits=True"):
            output[number]
    assert torch.equal(output[0], output["loss"])
    assert torch.equal(output[:1][0], output.loss)
    if class_name == "BertForPreTraining":  # as transformers numbers it
        assert torch.equal(output[2], output.seq_relationship_logits)
    whole = ours(**batch, return_logits=True)
    assert whole[1] is whole[name]
    assert [k for k in whole if k != name] == list(output)


@pytest.mark.parametrize(("class_name", "name"), ABSENT.items())
@pytest.mark.filterwarnings("error")
def test_absent_logits_are_as_none_everywhere_else(class_name, name, said):
    _, ours = small(class_name)
    output = ours.train()(**inputs_of(class_name))
    assert name not in output
    assert output.get(name) is None
    assert len(output) == len(output.to_tuple()) == (2 if class_name == "BertForPreTraining" else 1)
    output = type(output)({key: value.detach() for key, value in output.items()})
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    copies = [
        torch.utils._pytree.tree_unflatten(leaves, structure), type(output)(**output), copy.deepcopy(output),
        accelerate.utils.convert_to_fp32(output), pickle.loads(pickle.dumps(output)),
    ]  # fmt: skip
    for other in copies:
        assert isinstance(other, transformers.utils.ModelOutput)
        assert type(other) is type(output)
        assert list(other) == list(output)
        assert torch.equal(other.loss, output.loss)
    compiled = torch.compile(
        lambda o: 2 * o.loss if getattr(o, name) is None else o.loss, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(output), 2 * output.loss)
    assert said() == []
    output[name] = torch.ones(3)  # somebody's own
    assert torch.equal(getattr(output, name), output[name])


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.logits.logsumexp(-1).mean()


def test_a_trainer_with_a_loss_of_its_own(tmp_path, said):
    rows = rows_of(inputs_of("BertForMaskedLM", mask_of("ones")))
    reference, ours = small("BertForMaskedLM")
    trained_by_trainer(copy.deepcopy(ours), rows, tmp_path)
    assert said() == []
    with pytest.raises(AttributeError):
        trained_by_trainer(ours, rows, tmp_path, OwnLoss)
    assert len(said()) == 1
    ours.config.return_logits = True
    expected = trained_by_trainer(reference, rows, tmp_path, OwnLoss)
    for name, value in trained_by_trainer(ours, rows, tmp_path, OwnLoss).items():
        assert_same(value, expected[name], name)


def test_label_smoothing_by_trainer(tmp_path):
    rows = rows_of(inputs_of("BertForMaskedLM", mask_of("right")))
    reference, ours = small("BertForMaskedLM")
    expected = trained_by_trainer(reference, rows, tmp_path, label_smoothing_factor=0.1)
    for name, value in trained_by_trainer(ours, rows, tmp_path, label_smoothing_factor=0.1).items():
        assert_same(value, expected[name], name)


def test_a_loss_function_for_trainer_sees_the_logits_of_both_heads(tmp_path):
    """Trainer keeps the labels from the model then, and those of the sentences' order stay in the batch."""

    def loss(outputs, labels, num_items_in_batch=None):
        words = nn.functional.cross_entropy(outputs.prediction_logits.flatten(0, 1), labels.flatten())
        return words + outputs.seq_relationship_logits.square().sum()

    kind = functools.partial(transformers.Trainer, compute_loss_func=loss)
    rows = rows_of(inputs_of("BertForPreTraining", mask_of("right")))
    reference, ours = small("BertForPreTraining")
    expected = trained_by_trainer(reference, rows, tmp_path, kind)
    for name, value in trained_by_trainer(ours, rows, tmp_path, kind).items():
        assert_same(value, expected[name], name)


# --------------------------------------------------------------------------------------------------------------
# What others put around modules: right everywhere, and on rows alone where it changes nothing

PEFT = {
    "BertForMaskedLM": {"target_modules": ["query", "dense", "decoder"]},
    "BertForPreTraining": {"target_modules": ["query"], "modules_to_save": ["cls"]},
    "BertForTokenClassification": {"target_modules": ["value"], "task_type": "TOKEN_CLS"},
    "BertForSequenceClassification": {"target_modules": ["value", "dense"], "task_type": "SEQ_CLS"},
    "BertForQuestionAnswering": {"target_modules": ["value"], "task_type": "QUESTION_ANS"},
}


@pytest.mark.parametrize("class_name", PEFT)
def test_peft_on_heads(class_name):
    changes = peft.LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False, **PEFT[class_name])
    reference, ours = (peft.get_peft_model(model, changes) for model in small(class_name))
    ours.load_state_dict(reference.state_dict())
    saved = [p for n, p in (*reference.named_parameters(), *ours.named_parameters()) if "modules_to_save" in n]
    with torch.no_grad():  # another module than the one that it was made of
        for parameter in saved:
            parameter.mul_(1.5)
    mask = mask_of("right")
    batch = inputs_of(class_name, mask)
    got, gradients = run(ours, batch, True)
    expected, theirs = run(reference, batch, True)
    assert_same_run((got, gradients), (expected, theirs), mask, class_name)
    assert any(g is not None and g.any() for g in gradients)
    if class_name == "BertForMaskedLM":
        assert got.logits is None
    if class_name == "BertForTokenClassification":  # no padding in the classifier
        assert not got.logits[mask == 0].any()


def test_parts_that_are_pruned_or_parametrised_leave_the_others_fused(monkeypatch):
    _, ours = small("BertForPreTraining")
    layer = ours.bert.encoder.layer[0]
    prune.random_unstructured(layer.attention.self.query, "weight", 0.5)
    parametrizations.weight_norm(layer.output.dense)
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    calls = []
    attention = bert_fast.ops.attention
    monkeypatch.setattr(
        bert_fast.ops, "attention", lambda qkv, *a, **kw: calls.append(len(qkv)) or attention(qkv, *a, **kw)
    )
    ours.train()(**batch).loss.backward()
    assert calls == [int(batch["attention_mask"].sum())]  # rows of real tokens alone
