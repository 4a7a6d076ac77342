"""Writes the Python language reference, which every Python ships, as a corpus: JSON lines, one topic a document.

python examples/python_reference.py corpus.jsonl
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/python_reference.py CORPUS.jsonl")
    lines = [json.dumps({"name": name, "text": topics[name]}) for name in sorted(topics)]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{sys.argv[1]}: {len(lines)} documents")
