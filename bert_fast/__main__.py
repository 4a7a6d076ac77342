"""``python -m bert_fast``: the command line ``bert-fast``."""

import sys

from bert_fast.cli import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
