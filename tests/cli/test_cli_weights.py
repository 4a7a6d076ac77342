"""Checkpoints whose tensors are not what the model needs: every command that reads one says which, and why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bert_fast
from bert_fast.run.weights import UnfitWeights
from bert_fast.use.inference import load_model


@pytest.fixture
def altered(folder, tmp_path):
    """altered(tensors -> tensors, **fields of the configuration): a copy of ``model`` with these changes."""

    def altered(change=dict, **fields):
        made = tmp_path / "altered"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(folder / "model", made)
        save_file(change(load_file(made / "model.safetensors")), made / "model.safetensors", {"format": "pt"})
        about = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(about | fields))
        return made

    return altered


@pytest.fixture
def commands(folder, tmp_path):
    """Arguments of every command that reads a model, with MODEL for its folder."""
    examples = tmp_path / "examples.tsv"
    examples.write_text("one\ta\ntwo\tb\n" * 4)
    return [
        ("fill-mask", "MODEL", "a [MASK]"),
        ("encode", "MODEL", examples),
        ("evaluate", "MODEL", "--data", folder / "data"),
        ("finetune", "MODEL", "--train", examples, "--validation", examples, "--out", tmp_path / "classifier"),
        ("pretrain", "--init-from", "MODEL", "--data", folder / "data", "--out", tmp_path / "run", "--seq", 32,
         "--steps", 1, "--workers", 0),
    ]  # fmt: skip


def refused_by_all(run, commands, model, *message):
    for argv in commands:
        done = run(*(model if argument == "MODEL" else argument for argument in argv), "--quiet", "--device", "cpu")
        assert done.code in (1, 2), argv
        assert done.out == ""
        assert done.err.count("\n") == 1
        assert all(part in done.err for part in (str(model), *message)), (argv, done.err)


def another_shape(name, shape):
    return lambda tensors: tensors | {name: torch.randn(shape)}


@pytest.mark.parametrize(
    ("name", "shape", "ours"),
    [
        ("bert.embeddings.word_embeddings.weight", (601, 32), (600, 32)),
        ("bert.embeddings.position_embeddings.weight", (48, 32), (64, 32)),
        ("bert.encoder.layer.1.intermediate.dense.weight", (48, 32), (64, 32)),
        ("bert.encoder.layer.0.attention.self.query.bias", (30,), (32,)),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both(run, altered, commands, name, shape, ours):
    model = altered(another_shape(name, shape))
    refused_by_all(run, commands, model, name.removeprefix("bert."), f"{shape} in the file", f"{ours} by its config")


def test_a_configuration_that_does_not_fit_is_the_same(run, altered, commands):
    refused_by_all(run, commands, altered(intermediate_size=80), "(64,) in the file", "(80,) by its config")


def test_a_pooler_of_another_shape_is_no_head_to_draw(run, altered, commands):
    model = altered(another_shape("bert.pooler.dense.weight", (32, 16)))
    without_pooler = ("fill-mask",)
    refused_by_all(run, [argv for argv in commands if argv[0] not in without_pooler], model, "pooler.dense.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bert.embeddings.LayerNorm.bias", "bert.encoder.layer.1.output.dense.weight"])
def test_weights_that_are_not_finite_are_named(run, altered, commands, name, value):
    def broken(tensors):
        tensors[name].view(-1)[[1, 5]] = value
        return tensors

    refused_by_all(run, commands, altered(broken), name.removeprefix("bert."), "2 of the ", "NaN or infinite")


def test_a_checkpoint_with_more_layers_than_its_configuration_is_another_model(run, altered, commands):
    refused_by_all(run, commands, altered(num_hidden_layers=1), "encoder.layer.1.", "would not be used")


def test_tensors_that_no_plain_bert_has_are_not_left_out(run, altered, commands):
    def with_lora(tensors):
        return tensors | {"bert.encoder.layer.0.attention.self.query.lora_A.weight": torch.zeros(3, 32)}

    refused_by_all(run, commands, altered(with_lora), "lora_A", "would not be used")


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_checkpoint_saved_with_a_prefix_is_refused_with_its_name(run, altered, commands, prefix):
    model = altered(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    refused_by_all(run, commands, model, "no weights for", f"the file has {prefix}")


def test_what_is_not_of_the_encoder_may_be_there(altered):
    model = altered(lambda tensors: tensors | {"bert.embeddings.position_ids": torch.arange(64)[None],
                                               "classifier.weight": torch.randn(3, 32)})  # fmt: skip
    for cls in (bert_fast.BertModel, bert_fast.BertForMaskedLM):
        assert load_model(cls, model)[2] == []


def test_a_missing_shard_is_named(run, folder, tmp_path, commands):
    shutil.copytree(folder / "model", tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    model = bert_fast.BertForPreTraining.from_pretrained(folder / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    lost = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    lost.unlink()
    refused_by_all(run, commands, tmp_path / "sharded", lost.name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_fine_tuned_in_float32(run, folder, altered, commands, tmp_path, dtype):
    model = altered(lambda tensors: {n: t.to(dtype) for n, t in tensors.items()}, dtype=str(dtype).split(".")[1])
    (argv,) = (argv for argv in commands if argv[0] == "finetune")
    done = run(*(model if argument == "MODEL" else argument for argument in argv), "--warmup", 0, "--lr", 1e-5)
    assert done.code == 0
    tuned = load_file(tmp_path / "classifier" / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    before = load_file(model / "model.safetensors")[name].float()
    assert tuned[name].dtype == torch.float32
    assert (tuned[name] != before).float().mean() > 0.9  # steps of 1e-5 are lost in 16 bits


def test_pickled_weights_are_held_to_the_same(folder, tmp_path, altered):
    model = altered(another_shape("bert.embeddings.token_type_embeddings.weight", (3, 32)))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UnfitWeights, match=r"token_type_embeddings.weight has the shape \(3, 32\) .* \(2, 32\)"):
        load_model(bert_fast.BertModel, model)


def test_one_weight_that_is_missing_is_one(altered):
    name = "bert.embeddings.token_type_embeddings.weight"
    model = altered(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UnfitWeights, match=rf"{name} is missing and would be random$"):
        load_model(bert_fast.BertForMaskedLM, model)


@pytest.mark.parametrize("part", ["bert.pooler.dense.bias", "cls.seq_relationship.weight"])
def test_evaluate_says_what_next_sentence_prediction_lacks(run, folder, altered, part):
    model = altered(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != part})
    done = run("evaluate", model, "--data", folder / "data", "--max-sequences", 4, "--device", "cpu")
    assert done.code == 0
    assert f"{model} lacks {part}, which next-sentence prediction needs: MLM alone is measured" in done.err
    assert "NSP" not in done.out
