"""What `make docs` generates: the reference of the command line, docstrings as Markdown, links that leave the site.

mkdocs.yml names this file twice: its functions are hooks of MkDocs, its class is an extension of griffe, which reads
the docstrings.
"""

import argparse
import posixpath
import re
import sys
from pathlib import Path

import griffe
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

from bert_fast.cli import build_parser

CLI = "reference/cli.md"
WIDTH = 100  # columns of a help text
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
COLUMNS = re.compile(r"^\S.*?\S {3,}\S", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def cli_reference() -> str:
    """The help of `bert-fast` and of each of its commands, as Markdown."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line\n\nEach text is what `bert-fast COMMAND --help` prints."]
    for name, made in {"bert-fast": parser, **commands.choices}.items():
        title = name if made is parser else f"bert-fast {name}"
        made.formatter_class = _fixed_width(made.formatter_class)
        parts.append(f"## {title}\n\n```text\n{made.format_help().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _fixed_width(formatter: type) -> type:
    """``formatter`` with lines of WIDTH columns, whatever the terminal has."""
    return type(formatter.__name__, (formatter,), {
        "__init__": lambda self, prog: formatter.__init__(self, prog, width=WIDTH)
    })  # fmt: skip


def on_files(files, config):
    files.append(File.generated(config, CLI, content=cli_reference()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The site holds docs/ alone: a link to another file of the repository becomes that file's path."""
    folder = posixpath.dirname(page.file.src_uri)

    def outside(link: re.Match) -> str:
        text, target = link[1], posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if "://" in link[2] or target.startswith("docs/"):
            return link[0]
        return text if text.strip("`") == target else f"{text} (`{target}`)"

    return LINK.sub(outside, markdown)


class Docstrings(griffe.Extension):
    """Docstrings are read in a terminal; this makes Markdown of them."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Sphinx's roles (:func:`name`) become code, and paragraphs with columns keep them."""
    paragraphs = ROLE.sub(lambda role: f"`{role[1]}`", docstring).split("\n\n")
    return "\n\n".join(f"```text\n{x}\n```" if len(COLUMNS.findall(x)) > 1 else x for x in paragraphs)
