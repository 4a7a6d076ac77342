"""Folders of the package `datasets`, and names on the Hub: every row once, and nothing that is no text."""

import json

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from bert_fast.cli import main
from bert_fast.data import expand_paths, prepare, read_documents, stream_documents, train_tokenizer

datasets = pytest.importorskip("datasets")

ROWS = [f"Row {number} has a sentence. And another." for number in range(700)]


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory):
    """No progress bars, no network, and no cache outside of this test."""
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict({"text": ROWS, "meta": [{"text": f"Deep {n}."} for n in range(len(ROWS))]})


@pytest.fixture
def repository(tmp_path, rows, monkeypatch):
    """A clone of a data set's repository, "owner/set" from the folder that is the working one."""
    folder = tmp_path / "owner" / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    for split, part in (("train", rows), ("test", rows.select(range(3)))):
        part.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    return folder


NEWEST, BEFORE = "a" * 40, "b" * 40  # commits


@pytest.fixture
def hub(repository, rows, tmp_path, monkeypatch):
    """What stands for the Hub: it has "owner/set", whose branch main is at the newest of two commits."""
    old = tmp_path / "old" / "data"
    old.mkdir(parents=True)
    rows.select(range(2)).to_parquet(old / "train-00000-of-00001.parquet")
    commits, branches = {NEWEST: repository, BEFORE: old.parent}, {None: NEWEST, "main": NEWEST, "v1": BEFORE}
    load = datasets.load_dataset

    def dataset_info(self, name, *, revision=None):
        if name == "owner/unreachable":
            raise RuntimeError("no network")
        if name != "owner/set" or revision not in branches:
            raise ValueError(f"{name} has no revision {revision}")
        return huggingface_hub.DatasetInfo(id=name, sha=branches[revision])

    def load_dataset(name, *arguments, revision, **options):
        assert name == "owner/set"
        return load(str(commits[revision]), *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return branches


def texts(paths, **reading) -> list[str]:
    return [text.decode() for path in expand_paths(paths) for text in stream_documents(path, **reading)]


def test_a_saved_folder_is_its_rows_in_order_and_nothing_else(rows, tmp_path):
    chosen = rows.shuffle(seed=3).select(range(600))
    chosen.save_to_disk(tmp_path / "saved", num_shards=3)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["A cache."]}), tmp_path / "saved" / "cache-1.parquet")
    (tmp_path / "saved" / "cache-2.arrow").write_bytes(b"no rows")
    assert texts(tmp_path / "saved") == chosen["text"]
    assert texts(tmp_path, text_field="meta.text") == [meta["text"] for meta in chosen["meta"]]
    with pytest.raises(ValueError, match=r"no column 'body'; its columns are 'text', 'meta\.text'"):
        texts(tmp_path / "saved", text_field="body")
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"saved lacks data-00001-of-00003\.arrow, which its state\.json names"):
        expand_paths(tmp_path / "saved")


def test_a_file_of_arrow_is_read_whatever_its_name_and_a_damaged_one_is_named(tmp_path):
    table = pyarrow.table({"text": ["One.", None, "Three."]})
    with pyarrow.ipc.new_file(tmp_path / "a.feather", table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert texts(tmp_path / "a.feather") == ["One.", "Three."]
    (tmp_path / "b.arrow").write_bytes(b"\xff\xff\xff\xff\x10")
    with pytest.raises(ValueError, match=r"b\.arrow: cannot be read as Arrow"):
        texts(tmp_path / "b.arrow")


def test_of_several_splits_one_must_be_named(rows, repository, tmp_path):
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "dict")
    message = rf"dict is a data set with 2 splits: give one or more by name, as '{tmp_path}/dict/train', "
    with pytest.raises(ValueError, match=message):
        expand_paths(tmp_path / "dict")
    assert len(texts(tmp_path / "dict" / "test")) == 1
    with pytest.raises(ValueError, match=r"owner/set is a data set with 2 splits or configurations: .*data/test-\*'"):
        expand_paths(repository)
    assert texts(repository / "data" / "train-*") == ROWS
    (repository / "data" / "test-00000-of-00001.parquet").unlink()
    assert texts(repository) == ROWS  # without its card
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "single")
    assert texts(tmp_path / "single") == ROWS


def test_files_that_describe_no_data_set_are_files_like_others(tmp_path):
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).write_text(json.dumps({"text": f"In {name}."}))
    (tmp_path / "README.md").write_text("A text.")
    assert texts(tmp_path) == ["A text.", "In dataset_dict.json.", "In state.json."]


def test_a_name_on_the_hub_is_streamed(hub, repository, tmp_path):
    assert texts("hf://owner/set@train") == ROWS
    assert texts("hf://owner/set:default@test", text_field="meta.text") == ["Deep 0.", "Deep 1.", "Deep 2."]
    assert read_documents("hf://owner/set@test") == [[f"Row {n} has a sentence.", "And another."] for n in range(3)]
    tokenizer = train_tokenizer(ROWS, 200)
    made = [
        prepare(path, tokenizer, tmp_path / name, workers=1, unit_bytes=5000)
        for name, path in (("hub", "hf://owner/set@train"), ("disk", repository / "data" / "train-*"))
    ]
    assert made[0]["made_by"]["files"] == [[f"hf://owner/set@train?revision={NEWEST}", None]]
    assert made[0]["shards"] == made[1]["shards"]
    assert prepare("hf://owner/set@train", tokenizer, tmp_path / "hub", workers=1, unit_bytes=5000) == made[0]


def test_a_revision_is_read_and_recorded_and_another_one_is_not_taken_for_it(hub, tmp_path):
    assert texts("hf://owner/set?revision=v1") == ROWS[:2]
    assert texts(f"hf://owner/set:default@train?revision={BEFORE}") == ROWS[:2]
    assert texts("hf://owner/set@train?revision=main") == ROWS
    (path,) = expand_paths("hf://owner/set@train")
    hub[None] = hub["main"] = BEFORE  # while it is read: once more for a tokenizer, or by a worker
    assert texts([path]) == list(map(bytes.decode, stream_documents(path))) == ROWS
    tokenizer, out = train_tokenizer(ROWS, 200), tmp_path / "data"
    made = prepare("hf://owner/set@train", tokenizer, out, workers=1)
    assert made["made_by"]["files"] == [[f"hf://owner/set@train?revision={BEFORE}", None]]
    hub[None] = NEWEST
    with pytest.raises(ValueError, match=f"holds shards made otherwise .*revision={BEFORE}.*revision={NEWEST}"):
        prepare("hf://owner/set@train", tokenizer, out, workers=1)
    assert prepare(f"hf://owner/set@train?revision={BEFORE}", tokenizer, out, workers=1) == made


def test_a_folder_is_not_read_in_the_place_of_a_name_on_the_hub(repository):
    with pytest.raises(ValueError, match="hf://owner/set@train: owner/set is a folder here, too"):
        texts("hf://owner/set@train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "hf://owner/set",
            r"hf://owner/set\?.*: a data set with 2 splits: give one, as .*hf://owner/set@test\?rev.*aaa",
        ),
        ("hf://owner/set@dev", r"hf://owner/set@dev\?.*: .*Available splits"),
        ("hf://owner/set:other@train", r"hf://owner/set:other@train\?.*: .*'other' not found"),
        ("hf://owner/set?revision=v9", r"hf://owner/set\?revision=v9: owner/set has no revision v9"),
        ("hf://owner/set?version=1", r"hf://owner/set\?version=1 is no hf://NAME\[:CONFIG\]"),
        ("hf://owner/set?revision=", "is no hf://NAME"),
        ("hf://owner/other", r"hf://owner/other: owner/other has no revision None"),
        ("hf://owner/unreachable", r"hf://owner/unreachable: no network"),
        ("hf://", r"'hf:'"),
    ],
)
def test_what_is_not_on_the_hub_is_an_error_that_names_it(hub, name, message):
    with pytest.raises((OSError, ValueError), match=message):
        texts(name)


def test_from_the_command_line(hub, tmp_path, capsys):
    corpus, tok = "hf://owner/set@train", str(tmp_path / "tok")
    assert main(["tokenizer", corpus, "--vocab-size", "200", "--out", tok]) == 0
    assert main(["prepare", corpus, "--tokenizer", tok, "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["documents"][0]["place"] == f"hf://owner/set@train?revision={NEWEST}, row 1"
    assert main(["prepare", corpus, "--tokenizer", tok, "--out", str(tmp_path / "data"), "--workers", "2"]) == 0
    assert main(["prepare", str(tmp_path / "owner" / "set"), "--tokenizer", tok, "--out", str(tmp_path / "other")]) == 1
    assert "give one or more by name" in capsys.readouterr().err
