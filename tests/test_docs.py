"""The documents are true: every path, name, option, command and link in them is there."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import report
from bert_fast.cli import COMMANDS
from tests.support.documents import ROOT, anchors, wrong, wrong_links, wrong_paths

LOG = sorted((ROOT / "docs" / "log").glob("*.md"))
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "benchmarks/results/README.md", "dev/cuda_stand_in/README.md",
             "kernels/experiments/README.md")  # fmt: skip
DOCUMENTS = sorted({*(ROOT / name for name in ELSEWHERE), *(ROOT / "docs").rglob("*.md")} - set(LOG))
ROOMS = ("bert_fast", "kernels", "benchmarks", "dev", "scripts", "examples")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_a_document_is_true(document):
    assert wrong(document.read_text(encoding="utf-8"), document.parent) == []


@pytest.mark.parametrize("document", [*LOG, ROOT / "CHANGELOG.md"], ids=_name)
def test_a_diarys_links_lead_somewhere(document):
    assert list(wrong_links(document.read_text(encoding="utf-8"), document.parent)) == []


def test_the_paths_that_comments_name_are_there():
    sources = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    named = {_name(path): list(wrong_paths(path.read_text(encoding="utf-8"), bare=False)) for path in sources}
    assert {path: wrong for path, wrong in named.items() if wrong} == {}


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


def test_no_page_speaks_as_a_diary():
    """What was, and what has changed, belongs to the log and the changelog."""
    for document in DOCUMENTS:
        said = re.findall(r"\b(?:nobody|somebody|no longer|now)\b", document.read_text(encoding="utf-8"), re.IGNORECASE)
        assert not said, f"{_name(document)} says {said}"


def test_what_the_site_generates():
    site = pytest.importorskip("scripts.docs_site", reason="MkDocs is not installed", exc_type=ImportError)
    text = site.cli_reference()
    for name in COMMANDS:
        assert f"## bert-fast {name}\n\n```text\nusage: bert-fast {name} " in text
    assert max(map(len, text.splitlines())) <= 120
    page = SimpleNamespace(file=SimpleNamespace(src_uri="design/gpu.md"))
    links = "[a](step.md), [b](../../dev/x.md), [c](https://example.org/), [`Makefile`](../../Makefile)"
    shown = "[a](step.md), b (`dev/x.md`), [c](https://example.org/), `Makefile`"
    assert site.on_page_markdown(links, page, None, None) == shown
    docstring = "Of :func:`~bert_fast.a.b`.\n\nshort    one\nlonger   two\n\nplain text"
    assert site.as_markdown(docstring) == (
        "Of `bert_fast.a.b`.\n\n```text\nshort    one\nlonger   two\n```\n\nplain text"
    )
