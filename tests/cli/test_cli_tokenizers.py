"""Every command with tokenizers that are not plain BERT's: their ids, their gaps, and models with more rows."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import transformers
from tokenizers import Tokenizer

import bert_fast
from bert_fast import data
from bert_fast.cli import main
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.tokenizer import berts_tokenizer
from bert_fast.tasks.examples import Example
from bert_fast.tasks.finetuning import finetune
from bert_fast.tasks.sentences import Classify
from tests.support.kinds_of_tokenizers import KINDS, TEXTS, training_ids


def small_model(folder, tokenizer, rows: int):
    """A tiny BertForPreTraining of random weights with ``rows``, and the tokenizer beside it."""
    torch.manual_seed(2)
    config = bert_fast.BertConfig(
        vocab_size=rows, num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    bert_fast.BertForPreTraining(config).save_pretrained(folder)
    data.save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def gapped(folder, tmp_path_factory):
    """A folder with tok/, the vocabulary of ``folder`` with gaps in its ids, its rarest piece last, and data/."""
    made = tmp_path_factory.mktemp("gapped")
    described = json.loads((folder / "tok" / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {piece: 2 * number for piece, number in vocabulary.items() if number > 300}
    data.save_tokenizer(Tokenizer.from_str(json.dumps(described)), made / "tok")
    argv = ("prepare", folder / "corpus.jsonl", "--tokenizer", made / "tok", "--out", made / "data", "--workers", 1)
    assert main([str(argument) for argument in (*argv, "--quiet")]) == 0
    return made


def test_a_vocabulary_with_gaps_goes_through_every_command(run, folder, gapped, tmp_path):
    tokenizer = data.load_tokenizer(gapped / "tok")
    rows = max(tokenizer.get_vocab().values()) + 1
    assert tokenizer.get_vocab_size() < rows - 200
    (tmp_path / "examples.tsv").write_text("one\ta\ntwo\tb\n" * 4)
    size = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "size.json").write_text(json.dumps({**size, "dtype": "float32"}))
    out = tmp_path / "run"
    for argv in (
        ("pretrain", "--data", gapped / "data", "--out", out, "--model", tmp_path / "size.json", "--seq", 32, "--steps",
         2, "--batch-size", 4, "--validation", 0.3, "--workers", 0, "--peak-tflops", 1, "--device", "cpu"),
        ("evaluate", out, "--data", gapped / "data", "--max-sequences", 4),
        ("encode", out, "--out", tmp_path / "v.npy"),
        ("finetune", out, "--train", tmp_path / "examples.tsv", "--validation", tmp_path / "examples.tsv"),
        ("verify", gapped / "data", out),
    ):  # fmt: skip
        done = run(*argv, "--quiet", stdin="a sentence\n")
        assert (done.code, done.err) == (0, ""), argv
    assert json.loads((out / "model" / "config.json").read_text())["vocab_size"] == rows
    assert not (out / "model" / "vocab.txt").exists()


def test_random_replacements_are_tokens(gapped):
    tokenizer = data.load_tokenizer(gapped / "tok")
    dataset = data.PretrainingDataset(data.open_corpus(gapped / "data"), tokenizer, max_length=64)
    seen = {number for sample in dataset.__getitems__(range(len(dataset))) for number in sample.input_ids.tolist()}
    assert seen <= set(tokenizer.get_vocab().values())
    assert dataset.vocab_size == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("padding", [0, 1, 97])
def test_fill_mask_answers_with_tokens_alone(run, folder, gapped, tmp_path, padding):
    for tok in (folder / "tok", gapped / "tok"):
        tokenizer = data.load_tokenizer(tok)
        ids = set(tokenizer.get_vocab().values())
        model = small_model(tmp_path / tok.parent.name, tokenizer, max(ids) + 1 + padding)
        (candidates,) = run("fill-mask", model, "a [MASK].", "--top-k", 5000, "--json").result["masks"]
        assert {c["id"] for c in candidates} == ids
        assert all(c["token"] == tokenizer.id_to_token(c["id"]) for c in candidates)
        probabilities = [c["probability"] for c in candidates]
        assert probabilities == sorted(probabilities, reverse=True)


def test_whole_words_by_the_prefix_that_the_tokenizer_has(run, folder, gapped, tmp_path):
    described = json.loads((folder / "tok" / "tokenizer.json").read_text())
    model = described["model"]
    model["vocab"] = {piece.replace("##", "@@"): number for piece, number in model["vocab"].items()}
    model["continuing_subword_prefix"] = "@@"
    other, ours = Tokenizer.from_str(json.dumps(described)), data.load_tokenizer(folder / "tok")
    text = [["unbelievably long words, reencoded", "and others of this documentation"]]
    corpora = [data.encode_documents(text, tokenizer) for tokenizer in (ours, other)]
    samples = [
        data.PretrainingDataset(corpus, tokenizer, max_length=64, nsp=False, whole_word=True)[0]
        for corpus, tokenizer in zip(corpora, (ours, other), strict=True)
    ]
    assert samples[0].masked_positions.tolist() == samples[1].masked_positions.tolist()
    described["model"] |= {"continuing_subword_prefix": ""}
    none = Tokenizer.from_str(json.dumps(described))
    with pytest.raises(ValueError, match="whole-word masking needs"):
        data.PretrainingDataset(corpora[1], none, whole_word=True)


@pytest.mark.parametrize("kind", ["NFKC, lower case", "byte-level BPE", "added tokens"])
def test_every_folder_that_is_written_gives_the_ids_of_training(run, folder, tmp_path, kind):
    tokenizer = KINDS[kind]([s for document in data.read_documents(folder / "corpus.jsonl") for s in document] + TEXTS)
    tokenizer.save(str(tmp_path / "mine.json"))
    (tmp_path / "examples.tsv").write_text("one\ta\ntwo\tb\n" * 4)
    size = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "size.json").write_text(json.dumps({**size, "dtype": "float32"}))
    out = tmp_path / "run"
    for argv in (
        ("prepare", folder / "corpus.jsonl", "--tokenizer", tmp_path / "mine.json", "--out", tmp_path / "data",
         "--workers", 1),
        ("pretrain", "--data", tmp_path / "data", "--out", out, "--model", tmp_path / "size.json", "--seq", 32,
         "--steps", 2, "--batch-size", 2, "--checkpoint-every", 1, "--workers", 0, "--peak-tflops", 1, "--device",
         "cpu"),
        ("evaluate", out, "--data", tmp_path / "data", "--max-sequences", 2),
        ("pretrain", "--data", tmp_path / "data", "--out", tmp_path / "on", "--init-from", out / "model", "--seq", 32,
         "--steps", 1, "--batch-size", 2, "--workers", 0, "--peak-tflops", 1, "--device", "cpu"),
        ("finetune", out, "--train", tmp_path / "examples.tsv", "--validation", tmp_path / "examples.tsv", "--out",
         tmp_path / "classifier", "--epochs", 1),
    ):  # fmt: skip
        done = run(*argv, "--quiet")
        assert (done.code, done.err) == (0, ""), argv
    encoder = SentenceEncoder(tokenizer)
    written = [
        tmp_path / "data" / "tokenizer",
        out / "model",
        *(out / "checkpoints").iterdir(),
        tmp_path / "classifier",
    ]
    assert len(written) == 5
    for made in written:
        theirs = transformers.AutoTokenizer.from_pretrained(made)
        for pair in [("",), *((text,) for text in TEXTS), *pairwise(TEXTS)]:
            found = theirs(*pair)
            assert (found["input_ids"], found["token_type_ids"]) == training_ids(encoder, tokenizer, *pair), (
                made,
                pair,
            )


def test_finetune_encodes_as_pre_training_did(folder, tmp_path, monkeypatch):
    tokenizer = KINDS["NFKC, lower case"]([s for d in data.read_documents(folder / "corpus.jsonl") for s in d] + TEXTS)
    rows = max(tokenizer.get_vocab().values()) + 1
    model, seen = small_model(tmp_path / "model", tokenizer, rows), []
    original = Classify.encode

    def watched(*given):
        items = original(*given)
        seen.extend(items)
        return items

    monkeypatch.setattr(Classify, "encode", watched)
    examples = [Example(a[:40], b[:40], str(number % 2)) for number, (a, b) in enumerate(pairwise(TEXTS))]
    finetune(model, examples, examples, epochs=1, max_length=64)
    for example, found in zip(examples * 2, seen, strict=True):
        expected = training_ids(SentenceEncoder(tokenizer), tokenizer, example.text, example.pair)
        assert found.sequences == [expected]


@pytest.fixture
def cased(folder, tmp_path):
    """(a model with a cased tokenizer, data prepared from the same vocab.txt without case)."""
    save = data.save_tokenizer(berts_tokenizer(data.load_tokenizer(folder / "tok").get_vocab(), lowercase=False),
                               tmp_path / "cased")  # fmt: skip
    model = small_model(tmp_path / "model", data.load_tokenizer(save), 600)
    argv = ["prepare", folder / "corpus.jsonl", "--tokenizer", save / "vocab.txt", "--uncased", "--out",
            tmp_path / "uncased", "--workers", 1, "--quiet"]  # fmt: skip
    assert main([str(argument) for argument in argv]) == 0
    return model, tmp_path / "uncased"


def test_the_same_vocabulary_in_another_case_is_refused(run, folder, cased, tmp_path, monkeypatch):
    model, uncased = cased
    settings = ("--out", tmp_path / "run", "--seq", 32, "--steps", 1, "--workers", 0, "--device", "cpu")
    hub = tmp_path / "hub"
    snapshot = hub / "models--some--bert" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, snapshot)
    (hub / "models--some--bert" / "refs").mkdir()
    (hub / "models--some--bert" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(uncased, tmp_path / "other")
    data.save_tokenizer(data.load_tokenizer(model), tmp_path / "other" / "tokenizer")
    for argv in (
        ("evaluate", model, "--data", uncased),
        ("evaluate", folder / "model", "--data", folder / "data", "--baseline", tmp_path / "other"),
        ("pretrain", "--data", uncased, "--init-from", model, *settings),
        ("pretrain", "--data", uncased, "--init-from", "some/bert", *settings),
        ("pretrain", "--data", uncased, "--validation-data", tmp_path / "other", "--model", "tiny", *settings),
    ):
        done = run(*argv, "--quiet")
        assert done.code != 0, argv
        assert "another tokenizer" in done.err
        ours, theirs = ("cased", "uncased") if "--baseline" in argv else ("uncased", "cased")
        assert f"that one is {theirs}, this one is {ours}" in done.err
        assert "--tokenizer" in done.err or "--validation-data" in argv
    data.save_tokenizer(data.load_tokenizer(folder / "tok"), snapshot)
    good = ("pretrain", "--data", uncased, "--init-from", "some/bert", "--peak-tflops", 1, "--batch-size", 2)
    assert run(*good, *settings, "--quiet").code == 0
    more = ("tokenizer", folder / "corpus.jsonl", "--extend", "some/bert", "--add", 3, "--out", tmp_path / "more")
    assert run(*more, "--json").result["pieces_added"] == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (model / name).unlink()
    bare = run(
        "pretrain", "--data", uncased, "--init-from", model, *good[5:], *settings[2:], "--out", tmp_path / "bare"
    )
    assert (bare.code, f"{model} has no tokenizer" in bare.err) == (0, True)
