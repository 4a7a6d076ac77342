"""Every command with tokenizers that are not plain BERT's: their ids, their gaps, and models with more rows."""

import json

import pytest
import torch
from tokenizers import Tokenizer

import bert_fast
from bert_fast import data
from bert_fast.cli import main


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
