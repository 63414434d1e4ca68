"""Files that may hold a secret (`--env`), for this user only, and never half written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def files() -> Iterator[None]:
    """All that is made meanwhile, by child processes too, is for this user only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write(file: Path, text: str) -> None:
    """Whole or not at all. Raises OSError."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
        new.write(text)
    unfinished.rename(file)
