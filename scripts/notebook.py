"""A script of cells ("# %%", and "# %% [markdown]" with its text in comments) as a notebook without outputs.

    python scripts/notebook.py examples/domain.py      # writes examples/domain.ipynb

The format is nbformat 4.5. tests/test_example_scripts.py holds the notebook equal to its script.
"""

import json
import re
import sys
from pathlib import Path

CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", re.MULTILINE)


def notebook(script: str) -> str:
    """The text of the notebook that ``script`` is; ValueError where something stands before its first cell."""
    before, *parts = CELL.split(script)
    if before or not parts:
        raise ValueError("a script of cells begins with # %%")
    cells = []
    for number, (markdown, text) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        lines = text.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": "code", "execution_count": None, "id": f"cell-{number}", "metadata": {}, "outputs": []}
        if markdown:
            cell = {"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}}
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append(cell | {"source": lines})
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    about["language_info"] = {"name": "python"}
    whole = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python scripts/notebook.py SCRIPT.py ...")
    for name in sys.argv[1:]:
        path = Path(name)
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
