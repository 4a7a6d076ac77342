"""What a document says of the tree, held against the tree: paths, names, options, commands and links."""

import argparse
import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from bert_fast.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
ROOMS = "bert_fast|kernels|benchmarks|tests|docs|dev|scripts|examples"
GENERATED = {ROOT / "docs" / "reference" / "cli.md"}  # by scripts/docs_site.py, when the site is built

PATH = re.compile(rf"(?<![\w/.$-])(?:{ROOMS})/[\w./*-]*+(?!<)")
FILE = re.compile(r"(?<![\w/.*<>-])[\w-]+\.(?:py|cpp|hpp|h|sh)\b(?!/)")
NAME = re.compile(r"(?<![\w./-])(?:bert_fast|benchmarks)(?:\.[A-Za-z_]\w*)+")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]*)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")


def wrong(text: str, folder: Path = ROOT) -> list[str]:
    """Every complaint about ``text``, a document of ``folder``."""
    return [
        *wrong_paths(text),
        *wrong_names(text),
        *wrong_commands(text),
        *wrong_code(text),
        *wrong_links(text, folder),
    ]


def wrong_paths(text: str, bare: bool = True) -> Iterator[str]:
    """Paths that the tree lacks; with ``bare`` names of files without a folder as well."""
    prose = LINK.sub("", text)
    for path in {match.rstrip(".-") for match in PATH.findall(prose)}:
        if not (ROOT / path).exists() and not any(ROOT.glob(path)):
            yield f"no path {path}"
    for name in {name for code in _code(text) for name in FILE.findall(code)} if bare else ():
        if name not in _files():
            yield f"no file is called {name}"


@functools.cache
def _files() -> frozenset[str]:
    rooms = [ROOT / room for room in ROOMS.split("|") if (ROOT / room).is_dir()]
    return frozenset(p.name for base in (*rooms, ROOT) for p in (base.rglob("*") if base != ROOT else base.iterdir()))


def wrong_names(text: str) -> Iterator[str]:
    for name in set(NAME.findall(text)):
        if not _resolves(name):
            yield f"no name {name}"


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def wrong_commands(text: str) -> Iterator[str]:
    """Lines of blocks are parsed; of commands in a sentence the command and its options have to exist."""
    for language, block in FENCE.findall(text):
        if language in ("", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _wrong_command(line, whole=True)
    known = set().union(*_options_of_commands().values(), *map(_options_of_script, _scripts()))
    for span in SPAN.findall(FENCE.sub("", text)):
        span = " ".join(span.split())
        if span.startswith("--"):
            yield from (f"no option {option}" for option in OPTION.findall(span) if option not in known)
        else:
            yield from _wrong_command(span, whole=False)


def _wrong_command(line: str, whole: bool) -> Iterator[str]:
    line = line.strip().removeprefix("$ ")
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quotation mark of prose
        words = line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    for end in ("|", "<", ">"):
        if end in words:
            at = words.index(end)
            yield from _wrong_command(shlex.join(words[at + 1 :]), whole) if end == "|" else ()
            words = words[:at]
    if "bert_fast" in words[:-1] and words[0] in ("python", "torchrun"):  # -m bert_fast COMMAND
        words = ["bert-fast", *words[words.index("bert_fast") + 1 :]]
    if words[:1] == ["make"]:
        yield from _wrong_make(words[1:])
    elif words[:1] == ["bert-fast"] and words[1:2] not in ([], ["COMMAND"], ["..."]):
        yield from _wrong_bert_fast(words[1:], whole)
    elif words[:1] == ["python"] and len(words) > 1:
        script = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        if re.match(rf"({ROOMS})/", script) and (ROOT / script).exists():
            unknown = [x for x in OPTION.findall(line) if x not in _options_of_script(script)]
            yield from (f"{script} has no option {option}" for option in unknown)
        elif re.match(rf"({ROOMS})/", script):
            yield f"no script {script}"


def _wrong_bert_fast(words: list[str], whole: bool) -> Iterator[str]:
    options = _options_of_commands().get(words[0])
    if words[0].startswith("--"):
        return
    if options is None:
        yield f"no command bert-fast {words[0]}"
        return
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    yield from (f"bert-fast {words[0]} has no option {option}" for option in unknown)
    if whole and not unknown:
        try:
            build_parser().parse_args(words)
        except SystemExit as stop:
            if stop.code:
                yield f"bert-fast {shlex.join(words)} does not parse"


@functools.cache
def _options_of_commands() -> dict[str, set[str]]:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: {o for a in made._actions for o in a.option_strings} for name, made in commands.choices.items()}


def _scripts() -> list[str]:
    return [str(path.relative_to(ROOT)) for room in ("benchmarks", "dev") for path in (ROOT / room).rglob("*.py")]


@functools.cache
def _options_of_script(script: str) -> set[str]:
    """The options that a script and the modules of benchmarks/ which it imports add."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    found = {"--help"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
            for name in node.names:
                if name.name == "options":
                    found |= _options_of_script("benchmarks/options.py")
    return found


def _wrong_make(words: list[str]) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in words if "=" not in word):
        rule = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        if rule is None:
            yield f"make has no target {target}"
            continue
        script = re.search(r"((?:benchmarks|dev)/[\w/]+\.py).*\$\(ARGS\)", rule[1])
        given = [o for word in words if word.startswith("ARGS=") for o in OPTION.findall(word)]
        if script:
            yield from (f"make {target} takes no {o}" for o in given if o not in _options_of_script(script[1]))


def wrong_code(text: str) -> Iterator[str]:
    """Python compiles, and what it imports from here exists."""
    for language, block in FENCE.findall(text):
        if language != "python":
            continue
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            yield f"Python does not compile: {error}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("bert_fast", "benchmarks"):
                names = (f"{node.module}.{name.name}" for name in node.names)
                yield from (f"no name {name}" for name in names if not _resolves(name))


def wrong_links(text: str, folder: Path) -> Iterator[str]:
    for target in set(LINK.findall(FENCE.sub("", text))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else None
        if file in GENERATED:
            continue
        if file is not None and not file.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and anchor not in anchors(text if file is None else file.read_text(encoding="utf-8")):
            yield f"the link {target} has no such heading"


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def _code(text: str) -> list[str]:
    return [block for _, block in FENCE.findall(text)] + SPAN.findall(FENCE.sub("", text))
