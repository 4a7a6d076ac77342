"""Labelled examples: one line is one example or an error that names it, and what is one value is one class."""

import json
import os
import threading

import pytest

from bert_fast.tasks.examples import Example, doubtful_labels, label_names, read_examples

# Characters at which str.splitlines ends a line; none of them ends one of a table.
WITHIN = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def labelled(*labels: str) -> list[Example]:
    return [Example("", None, label) for label in labels]


@pytest.mark.parametrize("mark", [*WITHIN, "\r"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_line_is_one_example_whatever_its_text_holds(tmp_path, mark, end):
    (tmp_path / "t.tsv").write_bytes(f"a{mark}b\t1{end}c\t0{end}".encode())
    assert read_examples(tmp_path / "t.tsv") == [Example(f"a{mark}b", None, "1"), Example("c", None, "0")]
    (tmp_path / "t.tsv").write_bytes(f"id\ttext\tpair\tlabel{end}7\ta{mark}\t{mark}b\t1{end}8\tc\td\t0".encode())
    found = read_examples(tmp_path / "t.tsv", text="text", pair="pair", label="label")
    assert found == [Example(f"a{mark}", f"{mark}b", "1"), Example("c", "d", "0")]


@pytest.mark.parametrize("mark", WITHIN)
def test_a_csv_row_and_a_json_line_are_one_example_too(tmp_path, mark):
    (tmp_path / "t.csv").write_text(f'a{mark}b,1\n"c{mark}\n,d",0\n', newline="")
    assert read_examples(tmp_path / "t.csv") == [Example(f"a{mark}b", None, "1"), Example(f"c{mark}\n,d", None, "0")]
    line = json.dumps({"text": f"a{mark}b", "label": 1}, ensure_ascii=mark < " ")
    (tmp_path / "t.jsonl").write_text(f"{line}\n", newline="")
    assert read_examples(tmp_path / "t.jsonl") == [Example(f"a{mark}b", None, "1")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "7,a\rb,1\n8,c,0\n", "line 1: new-line character seen in unquoted field"),
        ("t.csv", "7,c,0\n8,some\rwords,1\n", "line 2: new-line character"),
        ("t.tsv", "a\t1\rb\t0\nc\t1\n", "line 1: a carriage return in column 1"),
        ("t.tsv", "c\t1\na\t1\rb\t0\n", "line 2: 3 columns, where the first line has 2"),
        ("t.tsv", "a\t1\nb\tc\t1\n", "line 2: 3 columns, where the first line has 2"),
        ("t.tsv", "a\tx\t1\nb\t1\n", "line 2: only 2 columns"),
        ("t.csv", "a,1\n\nb,c,1\n", "line 3: 3 columns"),
        ("t.csv", '"a",1\n"b" c,1\n', "line 2"),
        ("t.tsv", "a\t1\nb\t \n", "line 2: the label is empty"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "a", "label": NaN}\n', "line 2: the label is empty"),
        ("t.jsonl", '{"text": "a", "label": ["x", ["y"]]}\n', "line 1: 'label' is no label"),
        ("t.jsonl", '{"text": "a", "label": {"x": 1}}\n', "line 1: 'label' is no label"),
        ("t.jsonl", '{"text": ' + "[" * 200_000, "line 1: no JSON object"),
        ("t.tsv", "a\t1\nb\t0\nc\udcff\t1\n", "line 3 is not UTF-8"),
    ],
)
def test_what_is_not_one_example_is_an_error_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_a_column_that_is_named_twice_is_no_column(tmp_path):
    (tmp_path / "t.csv").write_text("text,text,label\na,b,1\n")
    with pytest.raises(ValueError, match="more than one column 'text' in its header"):
        read_examples(tmp_path / "t.csv", text="text", label="label")


def test_lines_that_end_with_carriage_returns_alone(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,1\rb,0\r")
    (tmp_path / "t.tsv").write_bytes(b"a\t1\r\rb\t0")
    for name in ("t.csv", "t.tsv"):
        assert read_examples(tmp_path / name) == [Example("a", None, "1"), Example("b", None, "0")]


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_text_may_be_long(tmp_path, separator):
    path = tmp_path / ("t.tsv" if separator == "\t" else "t.csv")
    long = "a word " * 40_000
    path.write_text(f"{long}{separator}1\nshort{separator}0\n")
    assert [len(example.text) for example in read_examples(path)] == [len(long), 5]


def test_examples_come_through_a_pipe(tmp_path):
    pipe = tmp_path / "t.tsv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("a\t1\nb\t0\n",))
    writer.start()
    assert len(read_examples(pipe)) == 2
    writer.join()


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "1.0", "0", "0.0", " 1"], ["0", "1"]),
        (["a ", "a", "b", "\u00a0b"], ["a", "b"]),
        (["10.0", "9.0", "2.0"], ["2.0", "9.0", "10.0"]),
        (["1e1", "10", "2"], ["2", "10"]),
        (["caf\u00e9", "cafe\u0301", "bar"], ["bar", "caf\u00e9"]),
        (["01", "1", "+1", "2"], ["1", "2"]),
        (["12345678901234567", "12345678901234568"], ["12345678901234567", "12345678901234568"]),
        (["1", "1.0", "other"], ["1", "other"]),
        (["1_0", "10"], ["10", "1_0"]),
        (["A", "a"], ["A", "a"]),
    ],
)
def test_what_is_one_value_is_one_class(labels, names):
    assert label_names(labelled(*labels)) == names
    with pytest.raises(ValueError, match="two labels at least"):
        label_names(labelled(*(label for label in labels if label.strip() == labels[0].strip())))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["1", "1.0", "0"], ["one value are one class: '1' and '1.0'"]),
        (["x", "x ", "y", " y"], ["'y' and ' y'; 'x' and 'x '"]),
        (["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"], ["look like measurements, 0.0 to 5.0: each of the 6"]),
        (["1e3", "2e3", "5"], ["look like measurements, 5 to 2e3"]),
        (["0.0", "1.0"], []),  # whole numbers, as a table with missing values makes them
        (["0", "1", "nan"], ["the label 'nan' among numbers"]),
        (["0", "1", "2"], []),
        (["header", *["0", "1"] * 2], ["the first line alone, '', has the label 'header'"]),
        (["Good", "good", "bad"], ["'Good' and 'good' differ in case alone"]),
    ],
)
def test_what_is_doubtful_in_labels_is_told(labels, told):
    train = labelled(*labels * 4) if "header" not in labels else labelled(*labels, *labels[1:])
    found = list(doubtful_labels(train, labelled(*labels)))
    assert len(found) == len(told)
    for text, part in zip(found, told, strict=True):
        assert part in text
