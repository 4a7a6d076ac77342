"""bert_fast.register: transformers' Auto classes give this engine's models, and give them back."""

import json

import numpy as np
import pytest
import transformers
from transformers.models.auto import modeling_auto

import bert_fast
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer, save_tokenizer
from bert_fast.model.swap import MODELS
from tests.support.heads import HEADS, assert_same_outputs, config, inputs_of, mask_of, qa

AUTO = {"BertModel": "AutoModel"} | {name: name.replace("Bert", "AutoModel") for name in HEADS if "For" in name}


@pytest.fixture
def registration():
    yield bert_fast.register()
    bert_fast.unregister()


@pytest.fixture
def saved(tmp_path):
    """saved(name): a folder with a model of transformers' class, tiny."""

    def save(name: str):
        getattr(transformers, name)(config(**qa(name))).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def given() -> dict[str, type]:
    autos = {name: kind for name, kind in vars(modeling_auto).items() if name.startswith("AutoModel")}
    bert = transformers.BertConfig
    return {name: kind._model_mapping[bert] for name, kind in autos.items() if bert in (kind._model_mapping or ())}


def test_every_auto_class_that_gives_an_encoder_gives_ours_and_the_way_back():
    before = given()
    assert {before[AUTO[name]].__name__ for name in AUTO} == {kind.__name__ for kind in MODELS}
    covered, left = bert_fast.register()
    try:
        for name, kind in given().items():
            assert kind is MODELS.get(before[name], before[name]), name
        assert {*AUTO.values(), "AutoModelForTextEncoding"} <= covered.keys()
        assert all(kind in MODELS.values() for kind in covered.values())
        assert left == {"AutoModelForCausalLM": transformers.BertLMHeadModel}
        assert bert_fast.register() == (covered, left)  # again: nothing changes
    finally:
        bert_fast.unregister()
    assert given() == before
    bert_fast.unregister()
    assert given() == before


@pytest.mark.parametrize("name", AUTO)
def test_models_that_auto_classes_load_compute_what_transformers_do(name, saved, registration):
    folder, batch = saved(name), inputs_of(name, mask_of("ones"))
    model = getattr(transformers, AUTO[name]).from_pretrained(folder).eval()
    assert type(model) is getattr(bert_fast, name)
    assert type(getattr(transformers, AUTO[name]).from_config(model.config)) is type(model)
    expected = getattr(transformers, name).from_pretrained(folder).eval()(**batch)
    assert_same_outputs(model(**batch), expected)


def test_what_is_left_is_said_once(monkeypatch):
    said, logger = [], transformers.utils.logging.get_logger("bert_fast.model.auto")
    monkeypatch.setattr(logger, "warning", said.append)
    type(logger).warning_once.cache_clear()
    for _ in range(3):
        bert_fast.register()
        bert_fast.unregister()
    (message,) = said
    assert "AutoModelForCausalLM still gives BertLMHeadModel" in message
    assert "transformers.BertModel" in message


def test_a_class_that_someone_else_registered_stays(registration, monkeypatch):
    class Mine(bert_fast.BertModel):
        pass

    monkeypatch.setitem(modeling_auto.MODEL_MAPPING._extra_content, transformers.BertConfig, Mine)
    covered, left = bert_fast.register()
    assert left["AutoModel"] is Mine
    assert "AutoModel" not in covered
    bert_fast.unregister()
    assert given()["AutoModel"] is Mine


def test_other_models_are_as_before(registration):
    mapping = modeling_auto.MODEL_MAPPING
    assert mapping[transformers.RobertaConfig] is transformers.RobertaModel
    assert bert_fast.BertConfig().is_decoder is False
    with pytest.raises(ValueError, match="no decoder"):
        transformers.AutoModel.from_config(transformers.BertConfig(is_decoder=True))


def test_code_that_a_checkpoint_brings_is_not_replaced_without_a_word(saved, registration):
    """transformers prefers a registered class to the code that trust_remote_code=True asks for."""
    path = (folder := saved("BertModel")) / "config.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps(made | {"auto_map": {"AutoModel": "mine.MyModel"}}))
    (folder / "mine.py").write_text("from transformers import BertModel\n\n\nclass MyModel(BertModel):\n    pass\n")
    with pytest.raises(ValueError, match=r"code of its own \(mine.MyModel\).*unregister"):
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(transformers.AutoModel.from_pretrained(folder)) is bert_fast.BertModel
    bert_fast.unregister()
    assert type(transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "MyModel"


TASKS = {
    "fill-mask": ("BertForMaskedLM", ("the [MASK] of it",)),
    "text-classification": ("BertForSequenceClassification", ("the cat sat",)),
    "token-classification": ("BertForTokenClassification", ("the cat sat",)),
    "feature-extraction": ("BertModel", ("the cat sat",)),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task, saved):
    name, inputs = TASKS[task]
    folder = saved(name)
    words = (*SPECIAL_TOKENS, "the", "cat", "sat", "of", "it")
    save_tokenizer(berts_tokenizer({word: number for number, word in enumerate(words)}, True), folder)
    expected = transformers.pipeline(task, model=str(folder), device="cpu")(*inputs)
    bert_fast.register()
    try:
        pipeline = transformers.pipeline(task, model=str(folder), device="cpu")
    finally:
        bert_fast.unregister()
    assert type(pipeline.model) is getattr(bert_fast, name)
    assert_near(pipeline(*inputs), expected)


def assert_near(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float | np.floating) else expected)
