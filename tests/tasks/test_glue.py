"""GLUE's files as they are published, its measures, and the table of a model beside BERT-base."""

import json
import random

import numpy as np
import pytest

from bert_fast.output import Output
from bert_fast.tasks.examples import Example
from bert_fast.tasks.glue import AX, TASKS, diagnostic_file, measured, missing_files, named_tasks, read_glue
from bert_fast.tasks.glue_runs import facts, run_glue, table
from tests.support.glue_files import write_glue


@pytest.fixture
def data(tmp_path):
    return write_glue(tmp_path / "glue_data")


def read(data, name, part="dev"):
    (task,) = named_tasks([name])
    return read_glue(data / name / task.parts[part].file, task)


def test_a_sentence_of_cola_is_in_the_last_of_four_columns_without_a_header(tmp_path):
    (tmp_path / "dev.tsv").write_text('gj04\t1\t\tThe "car" honked.\nbc01\t0\t*\tIt no is.\n', encoding="utf-8")
    found = read_glue(tmp_path / "dev.tsv", TASKS["CoLA"])
    assert found.examples == [Example('The "car" honked.', None, "1"), Example("It no is.", None, "0")]


def test_columns_are_found_by_their_names_and_quotation_marks_are_characters(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"  # as MRPC's begins
    (tmp_path / "dev.tsv").write_text(f'{header}1\t7\t8\t"One , he said .\tTwo "\r\n', encoding="utf-8", newline="")
    assert read_glue(tmp_path / "dev.tsv", TASKS["MRPC"]).examples == [Example('"One , he said .', 'Two "', "1")]
    header = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    header += "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    row = ["0", "1", "1n", "slate", "(a)", "(b)", "(A)", "(B)", "The new rights", "Everyone", *["entailment"] * 3,
           *["neutral"] * 3]  # fmt: skip
    (tmp_path / "dev_matched.tsv").write_text(header + "\t".join(row) + "\n", encoding="utf-8")
    found = read_glue(tmp_path / "dev_matched.tsv", TASKS["MNLI"]).examples
    assert found == [Example("The new rights", "Everyone", "neutral")]


def test_lines_without_all_columns_are_counted_in_qqp_and_an_error_elsewhere(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    lines = "0\t1\t2\tHow?\tWhy?\t0\n5\t6\t7\tHow do\n1\t3\t4\tWho?\tWhich?\t1\n"
    (tmp_path / "train.tsv").write_text(header + lines, encoding="utf-8")
    found = read_glue(tmp_path / "train.tsv", TASKS["QQP"])
    assert found == ([Example("How?", "Why?", "0"), Example("Who?", "Which?", "1")], [3])
    (tmp_path / "rte.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\n")
    with pytest.raises(ValueError, match=r"rte.tsv, line 3: 2 columns, where its header has 4"):
        read_glue(tmp_path / "rte.tsv", TASKS["RTE"])


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("SST-2", "sentence\tlabel\ngood\t2\n", "line 2: the label '2' is not one of 0, 1"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.5\n", "line 2: the label '5.5' is not a score from 0 to 5"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: the label 'nan' is not a score"),
        ("CoLA", "gj04\t1\t\ta\ngj04\t1\t\n", "line 2: 3 columns, where the first line has 4"),
        ("CoLA", "gj04\t1\n", "line 1: 2 columns"),
        ("QNLI", "index\tsentence1\tsentence2\tlabel\n", "no column 'question' in its first line"),
        ("RTE", "index\tsentence1\tsentence2\tlabel\n", "holds no example"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(tmp_path, task, content, message):
    (tmp_path / "dev.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_glue(tmp_path / "dev.tsv", TASKS[task])


def test_folders_are_found_in_any_case_and_what_lacks_files_is_named(data):
    (data / "SST-2").rename(data / "sst2")
    (data / "MNLI" / "dev_mismatched.tsv").unlink()
    assert missing_files(data, TASKS["SST-2"]) == []
    assert missing_files(data, TASKS["MNLI"]) == ["MNLI/dev_mismatched.tsv"]
    assert [task.name for task in named_tasks(["mnli", "Cola"])] == ["CoLA", "MNLI"]
    with pytest.raises(ValueError, match="GLUE has no task 'mnlii'"):
        named_tasks(["mnlii"])


def test_the_diagnostic_set_needs_labels(data):
    found, why = diagnostic_file(data)
    assert found is None
    assert "has no labels" in why
    (data / "diagnostic" / "diagnostic-full.tsv").write_text(
        "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis\tLabel\n"
        "\t\t\t\tNews\tThe cat sat.\tThe cat did not sit.\tcontradiction\n"
    )
    found, _ = diagnostic_file(data)
    examples = [Example("The cat sat.", "The cat did not sit.", "contradiction")]
    assert read_glue(found, AX).examples == examples


def test_measures_are_those_of_their_definitions():
    draw = np.random.default_rng()
    gold, said = draw.integers(0, 2, 200).astype(str), draw.integers(0, 2, 200).astype(str)
    tp, tn = ((gold == x) & (said == x) for x in "10")
    tp, tn, fp, fn = tp.sum(), tn.sum(), (said > gold).sum(), (said < gold).sum()
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert measured(TASKS["CoLA"], "dev", gold, said) == {"matthews": pytest.approx(matthews)}
    expected = {"f1": pytest.approx(2 * tp / (2 * tp + fp + fn)), "accuracy": pytest.approx((tp + tn) / 200)}
    assert measured(TASKS["MRPC"], "dev", gold, said) == expected
    x = draw.normal(size=50)
    scores = measured(TASKS["STS-B"], "dev", [f"{value}" for value in x], np.exp(3 * x))
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x, np.exp(3 * x))[0, 1])
    assert measured(TASKS["STS-B"], "dev", ["1", "2"], [3.0, 3.0]) == {"pearson": 0, "spearman": 0}


class Fitter:
    """Says what the file says, but for a share of answers that depends on the seed; counts how often it is asked."""

    def __init__(self, fails=()):
        self.asked, self.fails = [], fails

    def __call__(self, task, train, development, rate, seed):
        self.asked.append((task.name, rate, seed))
        if (task.name, seed) in self.fails:
            raise FloatingPointError("the loss is nan")
        draw = random.Random(f"{task.name} {seed}")
        said = {}
        for part, examples in development.items():
            gold = [example.label for example in examples]
            wrong = (seed + 1) * (1 if rate == 2e-5 else 2)
            for place in draw.sample(range(len(gold)), wrong):
                gold[place] = next(label for label in task.labels or ("0", "5") if label != gold[place])
            said[part] = gold if task.labels else [float(score) for score in gold]
        return said


def test_medians_over_seeds_stand_beside_the_published_scores(data, tmp_path):
    fit = Fitter()
    done, absent = run_glue(fit, data, TASKS.values(), seeds=3, output=Output(silent=True))
    assert len(fit.asked) == 9 * 3
    found = facts(done, absent)
    (measure,) = found["tasks"]["SST-2"]["measures"]
    assert measure == {"part": "dev", "metric": "accuracy", "median": 90.0, "scores": [95.0, 90.0, 85.0],
                       "published_test": 93.5, "published_development": 92.32}  # fmt: skip
    assert found["average"]["published_test"] == pytest.approx(79.6, abs=0.05)  # as their table has it
    scores = [m["median"] for task in found["tasks"].values() for m in task["measures"] if m["published_test"]]
    assert found["average"]["median"] == pytest.approx(sum(scores) / 9)
    text = table(done, absent)
    (line,) = [line for line in text.splitlines() if line.startswith("| SST-2")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["SST-2", "accuracy", "90.00", "85.00 to 95.00", "3", "2e-05", "92.32", "93.5"]
    assert "AX is left out" in text
    json.dumps(found, allow_nan=False)


def test_files_that_are_not_whole_are_said(data):
    done, absent = run_glue(Fitter(), data, named_tasks(["qqp", "rte"]), seeds=1, output=Output(silent=True))
    text = table(done, absent)
    assert "QQP: train.tsv: 1 lines lack columns and are left out, the first is 3." in text
    assert "RTE: dev.tsv has 20 examples, GLUE's 277." in text


def test_a_task_without_files_is_named_and_the_others_are_measured(data):
    (data / "RTE" / "train.tsv").unlink()
    done, absent = run_glue(Fitter(), data, named_tasks(["rte", "wnli"]), seeds=1, output=Output(silent=True))
    assert [found.task.name for found in done] == ["WNLI"]
    assert absent == {"RTE": f"no RTE/train.tsv in {data}"}
    assert facts(done, absent)["average"] is None


def test_runs_that_ended_are_not_made_again_and_those_of_others_are_refused(data, tmp_path):
    tasks, options = named_tasks(["cola", "mnli"]), {"out": tmp_path / "out", "output": Output(silent=True)}
    first, more = Fitter(), Fitter()
    run_glue(first, data, tasks, seeds=1, settings={"epochs": 3}, **options)
    found = run_glue(more, data, tasks, seeds=2, settings={"epochs": 3}, **options)
    assert more.asked == [("CoLA", 2e-5, 1), ("MNLI", 2e-5, 1)]
    assert facts(*found) == facts(*run_glue(Fitter(), data, tasks, seeds=2, output=Output(silent=True)))
    with pytest.raises(ValueError, match=r"another epochs \(3 there, 4 here\): use another --out"):
        run_glue(Fitter(), data, tasks, seeds=1, settings={"epochs": 4}, **options)
    with (data / "CoLA" / "dev.tsv").open("a") as file:
        file.write("gj04\t1\t\tMore.\n")
    with pytest.raises(ValueError, match=r"another file dev\.tsv"):
        run_glue(Fitter(), data, tasks, seeds=1, settings={"epochs": 3}, **options)


def test_a_loss_that_is_not_finite_ends_one_run_alone(data):
    fit = Fitter(fails={("CoLA", 1)})
    done, absent = run_glue(fit, data, named_tasks(["cola"]), seeds=3, output=Output(silent=True))
    assert len(done[0].scores(done[0].measures[0])) == 2
    text = table(done, absent)
    assert "2 of 3" in text
    assert "CoLA, seed 1: the loss is nan" in text
    failed = {(name, seed) for name in ("CoLA",) for seed in range(3)}
    text = table(*run_glue(Fitter(failed), data, named_tasks(["cola"]), seeds=3, output=Output(silent=True)))
    assert "0 of 3" in text


def test_of_several_learning_rates_the_best_median_is_taken(data):
    found, absent = run_glue(
        Fitter(), data, named_tasks(["rte"]), seeds=2, rates=(5e-5, 2e-5), output=Output(silent=True)
    )  # Fitter makes twice as many mistakes at 5e-5
    assert found[0].rate == 2e-5
    assert "RTE: the learning rate is the best of 5e-05, 2e-05 on these development sets" in table(found, absent)
