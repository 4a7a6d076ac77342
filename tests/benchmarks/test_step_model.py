"""The step model against counts made otherwise: the formula, what PyTorch is called with, what autograd keeps, and by
hand."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig

from benchmarks import operators
from benchmarks.predict import step_model
from benchmarks.workload import model_config, random_batch
from bert_fast import BertForPreTraining, flops, ops
from bert_fast.linear import gradients_in_place


def line(lines: list, operator: str, direction: str):
    (found,) = [x for x in lines if (x.operator, x.direction) == (operator, direction)]
    return found


# --------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize(("model", "seq"), [("base", 128), ("base", 512), ("large", 128), ("large", 512)])
def test_flops_are_those_of_the_formula(model, seq):
    config = model_config(model, dropout=0.1)
    lengths = [seq] * 8
    lines = step_model.step(config, lengths)
    twice = 6 * sum(s * s for s in lengths) * config.hidden_size * config.num_hidden_layers  # products made twice
    counted = sum(x.times * x.flops for x in lines) - twice
    predicted, read = step_model.predicted_rows(lengths), step_model.rows_read(lengths)
    assert read == predicted + 8 < 8 * seq
    assert counted == pytest.approx(flops.step_flops(config, lengths, predicted, train=True, read=read), rel=1e-12)
    # and the published formula of a sequence, three times the forward, less what the last layer leaves out
    layers, h, s, p = config.num_hidden_layers, config.hidden_size, seq, predicted / 8
    forward = 24 * layers * h * h * s + 4 * layers * h * s * s + p * (2 * h * h + 2 * h * 30522) + 2 * h * h + 4 * h
    assert counted == pytest.approx(8 * 3 * (forward - 18 * h * h * (s - p - 1)), rel=1e-12)


def test_a_batch_whose_every_row_is_read_has_a_whole_last_layer():
    config = model_config("base", dropout=0.1)
    lines = step_model.step(config, [2] * 5)
    assert step_model.rows_read([2] * 5) == 9 < 10
    assert step_model.rows_read([1] * 5) == 5
    whole = step_model.step(config, [1] * 5)
    assert line(whole, "bias_gelu", "forward").times == 12
    assert line(lines, "bias_gelu", "forward").times == pytest.approx(11.9)
    assert not [x for x in whole if x.operator == "rows that are read"]


# --------------------------------------------------------------------------------------------------------------
# What a step of the model really calls


CONFIG = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256,
          "vocab_size": 1200, "max_position_embeddings": 256}  # fmt: skip
LENGTHS = [200, 100, 250, 200]


class Calls(TorchDispatchMode):
    """What is called, with the shapes and bytes of its tensors. Views are left out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [[x for x in tree_leaves(found) if torch.is_tensor(x)] for found in ((args, kwargs), out)]
            self.calls.append((function._schema.name, *([(x.shape, x.nbytes) for x in found] for found in tensors)))
        return out


def recorded(weights: str, joined: bool) -> tuple[list, list]:
    """The calls of a forward and backward of CONFIG over LENGTHS, as in training, and of a second micro-batch."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**CONFIG)).to(getattr(torch, weights)).train()
    batch = random_batch(LENGTHS, 112, 256, "cpu", nsp=True, vocabulary=1200).packed
    found = []
    for _ in range(2):
        with (calls := Calls()), gradients_in_place(model.parameters()):
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32")
            with autocast, pytest.MonkeyPatch.context() as patch:
                if not joined:
                    patch.setattr(ops, "one_table_gradient", contextlib.nullcontext)
                loss = model(**batch, hidden_dtype=torch.bfloat16).loss
            loss.backward()
        found.append(calls.calls)
    return tuple(found)


def multiplied(calls: list) -> int:
    """FLOPs of the products."""
    total = 0
    for name, inputs, outputs in calls:
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            inner = inputs[name != "aten::mm"][0][1]  # of that the first is added
            total += 2 * outputs[0][0].numel() * inner
    return total


SMALL = 8000  # bytes: sizes, keys of rows, ids


def moved(calls: list, *names: str) -> int:
    """Bytes that the operators ``names`` read and write; of a row that is read or added to, that row alone."""
    total = 0
    for name, inputs, outputs in calls:
        if name not in names or max(size for _, size in inputs + outputs) <= SMALL:
            continue
        if name == "aten::index_select":
            total += 2 * outputs[0][1]
        elif name == "aten::index_add":  # in place, where nobody looks on
            total += 3 * inputs[-1][1]
        elif name == "aten::new_zeros":
            total += outputs[0][1]
        else:
            total += sum(size for _, size in inputs + outputs)
    return total


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize("joined", [False, True])
def test_what_is_charged_beside_the_fused_operators_is_what_pytorch_is_called_with(weights, joined):
    config = BertConfig(**CONFIG)
    lines = step_model.step(config, LENGTHS, weights, joined=joined)
    calls, later = recorded(weights, joined)

    def charged(*operators: str) -> float:
        return sum(x.times * x.bytes for x in lines if x.operator in operators)

    assert multiplied(calls) == pytest.approx(
        sum(x.times * x.flops for x in lines if x.operator.startswith(("product", "MLM transform", "pooler"))),
        rel=1e-12,
    )
    assert moved(calls, "aten::_foreach_copy_") == charged("weights q, k, v in one")
    assert moved(calls, "aten::sum") == 0  # the gradients of biases come out of the fused operators
    beside = [inputs[0][1] for name, inputs, _ in calls if name == "aten::addmm_"]
    assert len(beside) == 2 * 3
    assert sum(beside) == pytest.approx(charged("residual's gradient, read by the product"), rel=1e-9)
    rows = step_model.rows_read(LENGTHS) * 64 * 2
    adds = charged("sum of the tied table's gradients")
    assert moved(calls, "aten::add") == pytest.approx(adds, rel=1e-9)
    assert moved(calls, "aten::cat") == 2 * rows  # the gradients of the head's and of the pooler's part
    # rows read and given back, and zeros of all rows
    found = moved(calls, "aten::index_select", "aten::new_zeros", "aten::index_add", "aten::cat")
    assert found == pytest.approx(charged("rows that are read"), rel=1e-9)
    if weights == "float32":  # those of the transform and of the pooler are charged where they are made
        apart = 3 * 64 * 64 * (4 + 2)
        assert charged("rounding of weights") + apart == pytest.approx(moved(calls, "aten::_to_copy"), rel=1e-9)
    else:
        assert moved(calls, "aten::_to_copy") == 0
    products, others = step_model.accumulation(config, weights)
    added = [outputs[0][1] for name, inputs, outputs in later if name == "aten::addmm" and len(inputs[0][0]) == 2]
    sums = [inputs[0][1] for name, inputs, _ in later if name == "aten::add_"]
    if weights == "bfloat16":
        assert 2 * sum(added) == products.bytes
        assert (3 * sum(sums), len(sums)) == (others.bytes, others.kernels)
    else:  # a CPU makes and adds in two calls what a GPU does in one
        assert added == []
        assert len(sums) == others.kernels + 3 * 4 + 1
        assert 2 * sum(sums) == products.bytes + others.bytes * 2 / 3
    assert not [1 for name, *_ in calls if name == "aten::add_"]


def test_the_operators_bytes_by_hand():
    """Two layers of 64 and 256, two sequences of 100 tokens: 31 masked positions and 2 [CLS] are read, of 200 rows."""
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                        vocab_size=1000, max_position_embeddings=128)  # fmt: skip
    lines = step_model.step(config, [100, 100], joined=False)
    rows = 200 + 33  # of the first layer, and of the last one

    def total(operator: str, direction: str) -> float:
        x = line(lines, operator, direction)
        return x.times * x.bytes

    assert total("bias_gelu", "forward") == pytest.approx(rows * 256 * 2 * 2)
    assert total("bias_gelu", "backward") == pytest.approx(rows * 256 * 3 * 2)
    assert total("residual_layernorm", "forward") == pytest.approx(2 * rows * 64 * 4 * 2)
    assert total("residual_layernorm", "backward") == pytest.approx(2 * rows * 64 * 4 * 2)
    assert total("embedding_layernorm", "forward") == 200 * 64 * (2 + 2)
    # d out, a word's row; d z in float32, written once and read for each of the three tables; the tables
    assert total("embedding_layernorm", "backward") == 200 * 64 * (2 + 2 + 4 + 3 * 4) + (1000 + 128 + 2) * 64 * 2
    # 31 positions are one chunk. The table copied; logits read and overwritten, sums of the bias's gradient; d word
    # written in float32 and rounded, d hidden likewise
    assert total("mlm_loss", "forward") == 64000 * 4 + 31000 * (4 + 2) + 64000 * 4 + 64000 * 6 + 31 * 64 * 6
    assert total("sum of the tied table's gradients", "backward") == 3 * 64000 * 2
    # attention of all rows: two tiles of 64 cover 100 queries, and 100 keys
    assert line(lines, "attention", "forward").flops == 2 * 4 * 128 * 128 * 64
    assert line(lines, "attention", "backward").flops == 2 * 14 * 128 * 128 * 64
    bits = line(lines, "attention: bits of dropout", "forward")
    assert bits.instructions == pytest.approx(5.3 * 2 * 2 * 128 * 128)
    n = step_model.parameters(config)
    assert total("gradient norm", "update") == 2 * n
    assert total("lamb", "update") == n * (2 + 3 * 4 + 2 * 4 + 3 * 4 + 4 + 2)
    assert line(step_model.update(config, "float32", "adamw"), "adamw", "update").bytes == 28 * n
    # the norm and what makes one number of its sums; losses checked, and rates; the passes over all parameters
    for optimizer, passes in (("adamw", 1), ("lamb", 3)):
        assert [x.kernels for x in step_model.update(config, "bfloat16", optimizer)] == [4, 4 + 1, passes]
    # the table's two gradients meet in one buffer
    together = step_model.step(config, [100, 100])
    assert not [x for x in together if x.operator == "sum of the tied table's gradients"]
    without = BertConfig(**(config.to_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    lines = step_model.step(without, [100, 100])
    assert total("residual_layernorm", "backward") == pytest.approx(2 * rows * 64 * 3 * 2)
    assert not [x for x in lines if x.operator.startswith("attention:")]


def test_time_is_that_of_what_takes_longest():
    ceilings = step_model.Ceilings(matmul=100.0, copy=10.0, instructions=50.0, exponentials=2.0, shared=5.0, l2=4.0,
                                   between_kernels=0.5)  # fmt: skip
    entry = step_model.Entry("x", "forward", 2, flops=200, bytes=30, instructions=100, kernels=3)
    assert entry.seconds(ceilings) == 2 * (2 + 3 + 1.5)
    for longest in ({"instructions": 500}, {"exponentials": 20}, {"shared": 50}, {"l2": 40}):
        assert step_model.replace(entry, **longest).seconds(ceilings) == 2 * (10 + 1.5)


def test_attentions_resources_by_hand():
    """One sequence of 128 in one layer: four tiles of each of two heads. The clocks of a tile's backward on Hopper and
    what the L2 cache gives at a rate of products were counted from the kernels' machine code and docstrings."""
    config = BertConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
    forward, backward, *_ = step_model.attention(config, [128])
    tiles = 2 * 4
    assert forward.shared == tiles * (5 * 8 << 10)  # 64 x 64 elements of 2 bytes: Q, K, V; K and V copied in
    assert backward.shared / tiles / 128 == 1216
    assert backward.flops / tiles / (1024 * 4) == 896  # 4096 a clock
    assert forward.exponentials == tiles * (64 * 64 + 64)  # of each score, and to rescale each row
    assert backward.exponentials == tiles * 2 * 64 * 64
    assert forward.l2 / forward.flops * 340e12 == pytest.approx(5.3e12, rel=0.01)
    one_pass = step_model.five_products(backward)
    assert (one_pass.shared, one_pass.exponentials) == (tiles * (112 << 10), backward.exponentials / 2)
    assert step_model.asynchronous_forward(forward).l2 == forward.l2 / 2


def test_each_device_has_its_own_ceilings(monkeypatch):
    assert step_model.stated("NVIDIA H200") == step_model.ceilings_of({"device": "NVIDIA H200"})
    assert step_model.stated("NVIDIA H200").copy == 4.3e12
    assert step_model.stated("smoke") == step_model.Ceilings()
    a100, b200 = step_model.stated("NVIDIA A100-SXM4-80GB"), step_model.stated("NVIDIA B200")
    assert (a100.exponentials, a100.shared) == (108 * 16 * 1.41e9, 108 * 128 * 1.41e9)
    # on a B200 products are so fast that shared memory is the longest
    forward = step_model.attention(model_config("large", dropout=0.1), [512])[0]
    for device, longest in ((a100, forward.flops / a100.matmul), (b200, forward.shared / b200.shared)):
        assert forward.seconds(device) == pytest.approx(24 * (longest + 1e-6))
    lines = {row[0]: row for row in step_model.aims().rows}
    assert len(lines) == 4 + 3  # for an A100 no record is known
    config, lengths = model_config("large", dropout=0.1), [512] * 64
    full = flops.step_flops(config, lengths, step_model.masked_positions(lengths), train=True)
    assert float(lines["H200: half of the product's rate, full"][1]) == pytest.approx(1e3 * full / 399e12, rel=1e-3)
    monkeypatch.setattr(step_model, "RECORD", {"H100": 1e6})
    needs = {row[0]: row[-1] for row in step_model.aims().rows}
    assert needs["H100: MLPerf's best, wikipedia"] == "products in 8 bits"
    assert needs["H100: half of the product's rate, full"] == "met at the ceilings"


def test_parameters_are_those_of_the_model():
    config = model_config("tiny", dropout=0.1)
    assert step_model.parameters(config) == sum(p.numel() for p in BertForPreTraining(config).parameters())


def kept_bytes(layers: int, tokens: int) -> int:
    """Bytes that autograd keeps of a training forward, each storage once, parameters left out."""
    config = BertConfig(hidden_size=64, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=256,
                        vocab_size=120)  # fmt: skip
    model = BertForPreTraining(config).to(torch.bfloat16).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes again
        return tensor

    batch = random_batch([tokens // 2] * 2, 4, tokens // 2, "cpu", nsp=True, vocabulary=120).packed
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in storages.values())


def test_the_activations_kept_are_those_that_are_listed():
    config = BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=256)
    listed = sum(size for _, size, _ in step_model.activations(config))
    one_layer = {tokens: kept_bytes(3, tokens) - kept_bytes(2, tokens) for tokens in (64, 128)}
    assert (one_layer[128] - one_layer[64]) / 64 == listed


def test_predictions_follow_their_ceilings():
    config, lengths = model_config("base", dropout=0.1), [512] * 4
    lines = step_model.step(config, lengths)
    stated = step_model.predict(config, lengths, lines, step_model.Ceilings())
    assert 0 < stated.mfu < 1
    assert sum(stated.shares.values()) == pytest.approx(1)
    measured = step_model.ceilings_of({"limits": {"matmul_tflops": {"bfloat16": 700.0}, "copy_gbs": 2800.0}})
    assert (measured.matmul, measured.copy) == (700e12, 2.8e12)
    assert measured.attention_forward == step_model.Ceilings().attention_forward
    assert step_model.predict(config, lengths, lines, measured).seconds > stated.seconds
    with pytest.raises(ValueError, match="no line 'softmax'"):
        step_model.operator_seconds(config, lengths, "softmax", "forward", measured)


def test_wasted_tiles():
    tiled = step_model.tiled
    assert tiled([128, 64]) == (128**2 + 64**2, 128**2 + 64**2)
    assert tiled([65], 64, 64) == (65**2, 128**2)
    assert tiled([65], 128, 64) == (65**2, 128 * 128)


def test_each_candidate_saves_time_and_leaves_the_products_alone():
    config, lengths, ceilings = model_config("large", dropout=0.1), [512] * 64, step_model.Ceilings()
    lines = step_model.step(config, lengths)
    built = step_model.predict(config, lengths, lines, ceilings).seconds
    saved = {}
    for name, changes in step_model.CHANGES.items():
        changed = lines
        for change in changes:
            changed = [change(x) for x in changed]
            assert all(change(x) == x for x in lines if x.operator.startswith("product"))
        saved[name] = built - step_model.predict(config, lengths, changed, ceilings).seconds
    readme = (Path(step_model.__file__).parents[2] / "kernels" / "experiments" / "README.md").read_text(
        encoding="utf-8"
    )
    for seconds in (0, *(saved[f"bert_fast-{name}"] for name in ("one-pass", "asynchronous", "epilogue"))):
        assert f"{1e3 * (built - seconds):.1f} ms" in readme
    together = saved.pop("bert_fast-candidates")
    assert all(seconds > 0 for seconds in saved.values())
    assert together == pytest.approx(sum(saved.values()))


def test_operators_alone_against_the_copy_bandwidth():
    config, lengths, ceilings = model_config("large", dropout=0.1), [512] * 64, step_model.Ceilings()

    def share(operator: str, direction: str) -> float:
        work = operators.work_of(operator, direction, config, lengths, 2, 2)
        seconds = step_model.operator_seconds(config, lengths, operator, direction, ceilings)
        return operators.rate_of(work, seconds, {"copy_gbs": ceilings.copy / 1e9}, torch.bfloat16)["share_of_limit"]

    # x, residual read; out, z written: 8 bytes an element; one launch
    seconds = 8 * 32768 * 1024 / ceilings.copy
    assert share("residual_layernorm", "forward") == pytest.approx(seconds / (seconds + ceilings.between_kernels))
    # d out and word rows read are a fifth of what is moved, but for the tables and the launches
    assert 0.2 < share("embedding_layernorm", "backward") < 0.3
    whole, gelu = (step_model.operator_seconds(config, lengths, name, "forward", ceilings)
                   for name in ("feed_forward", "bias_gelu"))  # fmt: skip
    products = 2 * (2 * 32768 * 1024 * 4096 / ceilings.matmul + ceilings.between_kernels)
    assert whole == pytest.approx(products + gelu)
