"""GLUE's nine tasks as small files in the published formats, with rules that a model can learn."""

import random
from pathlib import Path

from bert_fast.tasks.glue import TASKS

HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
WORDS = {"0": ("assert", "statement", "value"), "1": ("break", "loop", "import"), "2": ("class", "name", "object")}


def write_glue(folder: Path, train: int = 40, development: int = 20, seed: int = 0) -> Path:
    """``folder`` with every task's files; a label is told by the words of the text, a score by how many there are."""
    draw = random.Random(seed)
    for task in TASKS.values():
        (folder / task.name).mkdir(parents=True)
        for name, part in task.parts.items():
            rows = [_row(task, number, draw) for number in range(train if name == "train" else development)]
            lines = ([HEADERS[task.name]] if task.name in HEADERS else []) + rows
            if task.tolerant and name == "train":
                lines.insert(2, "9\t8\t7\tcut")
            mark = "\ufeff" if task.name == "MRPC" else ""
            (folder / task.name / part.file).write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "diagnostic").mkdir()
    (folder / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    return folder


def _row(task, number: int, draw: random.Random) -> str:
    place = number % 6 if not task.labels else number % len(task.labels)  # every label is there
    words = draw.choices(WORDS["1"], k=place) + draw.choices(WORDS["0"], k=6 - place)
    if task.labels:
        words = draw.choices(WORDS[str(place)], k=4)
    draw.shuffle(words)
    label = task.labels[place] if task.labels else f"{place:.3f}"
    texts = ['"' + " ".join(words), "the other"][: len(task.texts)]
    columns = HEADERS.get(task.name, "source\t1\tmark\t3").split("\t")
    cells = dict.fromkeys(columns, "x") | dict(zip(task.texts, texts, strict=True)) | {task.label: label}
    return "\t".join(cells[column] for column in columns)
