"""The documents are true: every path, name, option, command and link in them is there."""

from pathlib import Path

import pytest

from benchmarks import report
from tests.support.documents import ROOT, anchors, wrong, wrong_links

LOG = sorted((ROOT / "docs" / "log").glob("*.md"))
DOCUMENTS = sorted({ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - set(LOG))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_a_document_is_true(document, request):
    if document.name == "README.md":
        request.applymarker(pytest.mark.xfail(strict=True, reason="its links name where the pages were"))
    assert wrong(document.read_text(encoding="utf-8"), document.parent) == []


@pytest.mark.parametrize("document", [*LOG, ROOT / "CHANGELOG.md", ROOT / "benchmarks/results/README.md"], ids=_name)
def test_a_diarys_links_lead_somewhere(document):
    assert list(wrong_links(document.read_text(encoding="utf-8"), document.parent)) == []


def test_the_page_of_figures_is_made_of_the_results_and_short(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    assert len((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("see bert_fast/ops/nothing.py.", "no path bert_fast/ops/nothing.py"),
        ("all of `kernels/*.cuh`", "no path kernels/*.cuh"),
        ("`nothing_here.py` has it", "no file is called nothing_here.py"),
        ("call `bert_fast.acelerate(model)`", "no name bert_fast.acelerate"),
        ("::: bert_fast.run.config.Pretrain", "no name bert_fast.run.config.Pretrain"),
        ("run `bert-fast train`", "no command bert-fast train"),
        ("`bert-fast pretrain --dropuot 0.1` works", "bert-fast pretrain has no option --dropuot"),
        ("```\nbert-fast encode\n```", "bert-fast encode does not parse"),
        ("```\ncat a | bert-fast encode run --pool mean\n```", "bert-fast encode has no option --pool"),
        ("```\ntorchrun --nproc-per-node 8 \\\n  -m bert_fast pretrian\n```", "no command bert-fast pretrian"),
        ("set `--micro-token` lower", "no option --micro-token"),
        ("`make tests`", "make has no target tests"),
        ("`make gpu ARGS='--lst'`", "make gpu takes no --lst"),
        ("`python benchmarks/run.py --sequence 512`", "benchmarks/run.py has no option --sequence"),
        ("`python -m benchmarks.profile`", "no script benchmarks/profile.py"),
        ("```python\nfrom bert_fast.use.inference import encode\n```", "no name bert_fast.use.inference.encode"),
        ("```python\nbert_fast.accelerate(\n```", "Python does not compile"),
        ("[a page](docs/nowhere.md)", "the link docs/nowhere.md leads nowhere"),
        ("[a part](Makefile#nothing)", "the link Makefile#nothing has no such heading"),
        ("# One\n[two](#two)", "the link #two has no such heading"),
    ],
)
def test_what_is_not_there_is_found(text, complaint):
    assert any(found.startswith(complaint) for found in wrong(text)), wrong(text)


def test_what_is_there_is_not_complained_of():
    text = (
        "# A `heading` of bert_fast\n[up](#a-heading-of-bert_fast), [a file](README.md), `kernels/*.py`, `layers.py`, "
        "bert_fast/cli/, `bert_fast.accelerate`, `python -m bert_fast.env`, `bert-fast COMMAND --help`, `make gpu "
        "ARGS=--list`, `--seq`, `pip install --upgrade x`.\n```\nzstdcat a.zst | bert-fast prepare - --tokenizer tok "
        "--out data   # a comment\ntorchrun --nproc-per-node 8 -m bert_fast pretrain --data data --out run\n```\n"
    )
    assert wrong(text) == []
    assert anchors("## Exact, `resume`\n```\n# no heading\n```") == {"exact-resume"}
