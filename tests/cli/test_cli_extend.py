"""bert-fast tokenizer --extend, and pre-training that goes on with the tokenizer that it makes."""

import json
import shutil
from pydoc_data.topics import topics

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bert_fast
from bert_fast import data
from bert_fast.data.tokenizer import berts_tokenizer
from tests.support.kinds_of_tokenizers import KINDS, TEXTS

DOMAIN = [topics[name] for name in sorted(topics)[40:50]]
OF_A_RUN = ("--seq", 32, "--batch-size", 4, "--validation", 0, "--lr", 0, "--workers", 0,
            "--peak-tflops", 1, "--device", "cpu")  # fmt: skip
TABLES = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "domain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOMAIN))
    return path


def tokens(tokenizer, texts=DOMAIN) -> int:
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))


def saved(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("padding", [7, 400])
def test_a_checkpoint_goes_on_with_the_pieces_of_a_domain(run, folder, corpus, tmp_path, padding):
    source, tok, prepared, out = (tmp_path / name for name in ("checkpoint", "tok", "data", "run"))
    model = bert_fast.BertForPreTraining.from_pretrained(folder / "model")
    model.resize_token_embeddings(600 + padding, mean_resizing=False)
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(source)
    base = data.load_tokenizer(folder / "tok")
    data.save_tokenizer(base, source)
    done = run("tokenizer", corpus, "--extend", source, "--add", 40, "--out", tok)
    ours = data.load_tokenizer(tok)
    old, new = tokens(base), tokens(ours)
    assert (done.code, new < 0.9 * old) == (0, True)
    assert f"640 pieces, 40 of them added to those of {source}: {1 - new / old:.1%} fewer tokens, {new:,}" in done.out
    assert transformers.AutoTokenizer.from_pretrained(tok)(DOMAIN)["input_ids"] == [
        encoding.ids for encoding in ours.encode_batch(DOMAIN)
    ]
    assert run("prepare", corpus, "--tokenizer", tok, "--workers", 1, "--out", prepared, "--quiet").code == 0
    argv = ("pretrain", "--data", prepared, "--init-from", source, "--out", out, *OF_A_RUN, "--steps")
    begun = run(*argv, 2)
    assert begun.code == 0
    assert f"40 pieces are new to {source}: " in begun.err
    assert f"they make text {1 - new / old:.1%} shorter ({new:,} tokens where there were {old:,})" in begun.err
    made = json.loads((out / "model" / "config.json").read_text())
    assert made["vocab_size"] == max(640, 600 + padding)
    before, after = saved(source), saved(out / "model")
    for name in TABLES:
        assert torch.equal(after[name][:600], before[name][:600])
        assert torch.equal(after[name][640:], before[name][640:])
        for number in range(600, 640):
            if not (piece := ours.id_to_token(number)).startswith("##"):
                ids = base.encode(piece, add_special_tokens=False).ids
                torch.testing.assert_close(after[name][number], before[name][ids].mean(0))
    theirs = transformers.BertForPreTraining.from_pretrained(out / "model")
    assert torch.equal(theirs.cls.predictions.decoder.weight, after[TABLES[0]])
    assert torch.equal(theirs.cls.predictions.decoder.bias, after[TABLES[1]])
    again = run(*argv, 3)
    assert (again.code, "update 2 of 3" in again.err, "new to" in again.err) == (0, True, False)


def test_what_the_checkpoint_does_not_say_itself_is_refused(run, folder, corpus, tmp_path):
    source = tmp_path / "checkpoint"
    shutil.copytree(folder / "model", source)
    KINDS["byte-level BPE"](TEXTS).save(str(tmp_path / "tokenizer.json"))
    for flags, message in (
        (("--add", 5), "--add without --extend CHECKPOINT"),
        (("--extend", source, "--vocab-size", 700, "--cased"), "--vocab-size, --cased beside --extend"),
        (("--extend", source, "--keep-accents"), "--keep-accents beside --extend"),
        (("--extend", source, "--limit-alphabet", 9), "--limit-alphabet beside --extend"),
        (("--extend", source, "--add", 0), "'0' is no whole number of at least 1"),
        (("--extend", tmp_path / "nothing"), f"--extend {tmp_path / 'nothing'} is no folder, and no name on the Hub"),
        (("--extend", tmp_path), "this tokenizer is BPE without"),
    ):
        done = run("tokenizer", corpus, "--out", tmp_path / "tok", *flags)
        assert (done.code > 0, message in done.err) == (True, True), done.err
        assert not (tmp_path / "tok" / "tokenizer.json").exists()
    kept = (source / "tokenizer.json").read_bytes()
    done = run("tokenizer", corpus, "--extend", source, "--out", tmp_path / "." / "checkpoint", "--overwrite")
    assert (done.code, "is the checkpoint itself" in done.err) == (1, True)
    assert (source / "tokenizer.json").read_bytes() == kept
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").unlink()
    done = run("tokenizer", corpus, "--extend", source, "--out", tmp_path / "tok")
    assert (done.code, "has neither tokenizer.json nor vocab.txt" in done.err) == (1, True)


def test_a_corpus_with_fewer_pieces_to_add_says_how_many(run, folder, tmp_path):
    text = "A pterodactyl, another pterodactyl. \u4e9c" * 3
    argv = ("tokenizer", "-", "--extend", folder / "model", "--out", tmp_path / "tok", "--overwrite", "--json")
    before = data.load_tokenizer(folder / "model").get_vocab().keys()
    for least, known in ((3, {"pterodactyl", "another"}), (4, {"pterodactyl"})):
        done = run(*argv, "--min-frequency", least, stdin=text)
        assert data.load_tokenizer(tmp_path / "tok").get_vocab().keys() - before == known
        assert done.result["pieces_added"] == len(known)
        assert done.result["tokens"] < done.result["tokens_before"]
        few, unknown = [line["text"] for line in done.lines if line["kind"] in ("note", "warning")]
        assert few.startswith(f"{len(known)} pieces added, not 3,000: no other occurs --min-frequency {least} times")
        assert unknown == f"3 words (14.29%) have characters that {folder / 'model'} lacks, and stay [UNK]"


def test_a_tokenizer_that_extends_another_one_is_refused(run, folder, corpus, tmp_path):
    """Also where the model has rows for all of it, and where only the case differs."""
    known = data.load_tokenizer(folder / "tok").get_vocab()
    pieces = sorted(known, key=known.get)
    pieces[-1], pieces[-2] = pieces[-2], pieces[-1]
    swapped = {piece: number for number, piece in enumerate([*pieces, "more"])}
    for tokenizer, said in (
        (berts_tokenizer(swapped, lowercase=True), "2 tokens have other ids there"),
        (berts_tokenizer(known | {"more": 600}, lowercase=False), "that one is uncased, this one is cased"),
    ):
        prepared = tmp_path / said.replace(" ", "-")
        data.prepare(corpus, tokenizer, prepared, workers=1)
        done = run(
            "pretrain", "--data", prepared, "--init-from", folder / "model", "--out", tmp_path / "run", *OF_A_RUN
        )
        assert (done.code, said in done.err, "--extend" in done.err) == (2, True, True)
    size = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    bert_fast.BertForPreTraining(bert_fast.BertConfig(vocab_size=500, **size)).save_pretrained(tmp_path / "small")
    data.save_tokenizer(data.load_tokenizer(folder / "tok"), tmp_path / "small")
    argv = ("pretrain", "--data", folder / "data", "--init-from", tmp_path / "small", "--out", tmp_path / "run")
    done = run(*argv, *OF_A_RUN)
    assert (done.code, "has a vocabulary of 500, the data's tokenizer 600" in done.err) == (2, True)
