"""The package as a user gets it: what is importable, what is shipped, and what happens where something is missing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from bert_fast import extras
from tests.support.child import ROOT, WITHOUT, run


def test_the_folder_kernels_is_never_a_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "bert_fast" / "kernels").is_symlink()
    code = "import transformers, transformers.utils as u; print(u.import_utils.is_kernels_available())"
    assert run(sys.executable, "-c", code).stdout.split()[-1] == "False"


def test_import_and_training_without_triton():
    code = """
import sys, warnings
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, bert_fast
assert "triton" not in sys.modules
assert bert_fast.backends()["bias_gelu"]["cpu"] in ("cpu", "reference")
bert_fast.set_backend("reference")
from bert_fast import ops
x = torch.randn(3, 5, requires_grad=True)
ops.bias_gelu(x).sum().backward()
print(x.grad.shape)
"""
    assert "torch.Size([3, 5])" in run(sys.executable, "-c", code).stdout


def test_the_drop_in_needs_no_extra():
    """Of what pyproject.toml does not require nothing is imported to build, train and save a model."""
    code = (
        WITHOUT.format(missing=sorted(extras.BROUGHT_BY))
        + """
import tempfile, torch, bert_fast
config = bert_fast.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                              intermediate_size=32, max_position_embeddings=16)
model = bert_fast.BertForPreTraining(config)
ids = torch.randint(0, 40, (2, 8))
model(ids, labels=ids, next_sentence_label=torch.tensor([0, 1])).loss.backward()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    bert_fast.BertModel.from_pretrained(folder)
print("done")
"""
    )
    assert run(sys.executable, "-c", code).stdout.split()[-1] == "done"


@pytest.mark.parametrize(
    ("package", "given", "extra"),
    [
        ("sentencex", "corpus.txt", "pretrain"),
        ("pyarrow", "corpus.txt.zst", "pretrain"),
        ("datasets", "hf://owner/set", "datasets"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(package, given, extra, tmp_path):
    """By a command that needs it, in one line."""
    text = "One sentence. Another one.\n\nA second text. Its end.\n"
    (tmp_path / "corpus.txt").write_text(text * 9, encoding="utf-8")
    (tmp_path / "corpus.txt.zst").write_bytes(bytes.fromhex("28b52ffd20023100002e0a"))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n", encoding="utf-8")
    code = (
        WITHOUT.format(missing=[package])
        + f"""
from bert_fast.cli import main
sys.exit(main(["prepare", {given!r}, "--tokenizer", "vocab.txt", "--out", "data", "--workers", "1"]))
"""
    )
    done = run(sys.executable, "-c", code, check=False, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"bert-fast prepare: error: {package} is not installed, which this needs: pip install 'bert_fast[{extra}]'"
    )


def test_extras_are_those_of_pyproject():
    """Nothing is required that an extra brings, and every package is in the extra that the message names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {extra: _names(needs) for extra, needs in project["optional-dependencies"].items()}
    required = _names(project["dependencies"])
    for package, extra in extras.BROUGHT_BY.items():
        assert extras.INSTALLED_AS.get(package, package) in optional[extra]
        assert extras.INSTALLED_AS.get(package, package) not in required


def _names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_environment_report():
    report = run(sys.executable, "-m", "bert_fast.env").stdout
    for word in ("torch", "triton", "transformers", "threads", "reference", "flash_attn", "attention"):
        assert word in report


def test_missing_prerequisites_are_named_with_their_package(tmp_path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$*" in *venv*|-) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = run("/bin/sh", "scripts/check_prerequisites.sh", str(python), check=False, PATH=str(tmp_path))
    assert done.returncode == 1
    for package in ("python3-venv", "python3-dev", "g++"):
        assert f"apt-get install {package}" in done.stderr
    assert run("/bin/sh", "scripts/check_prerequisites.sh", sys.executable).returncode == 0


def test_a_build_that_fails_leaves_no_library_of_other_sources(tmp_path):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "bert_fast"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    library = tmp_path / "kernels" / "cpu" / "libbert_fast_cpu.so"
    library.write_bytes(b"of yesterday")
    command = sys.executable, str(tmp_path / "setup.py"), "build_ext", "--inplace"
    done = run(*command, cwd=tmp_path, CXX="/bin/false")
    assert "the C++ operators were not built" in done.stderr
    assert not library.exists()


def test_pinned_versions_are_within_the_supported_ranges():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    pins = dict(
        line.split(";")[0].strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line.partition("#")[0].partition(";")[0]
    )  # fmt: skip
    ranges = [Requirement(r) for r in requires("bert_fast")]
    assert ranges
    for requirement in ranges:
        if requirement.name in pins and requirement.marker is None:
            assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} excludes the pinned version"


@pytest.mark.slow
def test_wheel_holds_kernels_and_installs_without_them_being_compiled(tmp_path):
    def wheel(folder, **environment):
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), ".",
            **environment)  # fmt: skip
        (path,) = folder.glob("*.whl")
        return path

    complete = wheel(tmp_path / "complete")
    names = zipfile.ZipFile(complete).namelist()
    assert "bert_fast/kernels/attention.py" in names
    assert "bert_fast/kernels/cpu/__init__.py" in names
    assert any(name.startswith("bert_fast/kernels/cpu/") and name.endswith((".so", ".dylib")) for name in names)
    assert not any(name.startswith("kernels/") for name in names)
    assert "-py3-none-" in complete.name

    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(complete))
    code = "import bert_fast; print(bert_fast.__file__); print(bert_fast.backends()['attention']['cpu'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(site / "bert_fast" / "__init__.py"), "cpu"]
