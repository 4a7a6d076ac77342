"""What a user without root's rights meets, for tests that may run as root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_root() -> Iterator[None]:
    """Root may read and write everywhere: somebody else meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
