"""What is a secret among variables and flags, so that what is shown and passed on has none in it."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

HIDDEN: Final = "***"
_SECRET = re.compile(
    r"(?i)(^|_)(keys?|token|secret|password|passwd|credentials?|jwt|headers|connection_string|auth|sas)$"
)
_SECRET_FLAGS = ("--api-key", "--hf-token")
"""vLLM's, whose beginnings its parser takes too."""
_SHORTEST_BEGINNING = 7
_IN_A_URL = re.compile(r"(://)[^/@\s]+@")


def is_secret(name: str) -> bool:
    """Whether a variable or flag of that name holds one."""
    is_beginning = len(name) >= _SHORTEST_BEGINNING and any(flag.startswith(name) for flag in _SECRET_FLAGS)
    return is_beginning or _SECRET.search(name.strip("-").replace("-", "_")) is not None


def shown_value(name: str, text: str) -> str:
    """A variable's value without its secret, the user and password of an address among them."""
    return HIDDEN if is_secret(name) else _IN_A_URL.sub(rf"\1{HIDDEN}@", text)


def secret_words(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word, and the flag whose secret it holds; an empty one for all others. A flag may take several values."""
    before = ""
    for word in command:
        if word.startswith("-"):
            flag, equals, _ = word.partition("=")
            is_one = flag.startswith("--") and is_secret(flag)
            yield word, flag if is_one and equals else ""
            before = flag if is_one and not equals else ""
        else:
            yield word, before


def without_secrets(command: Sequence[str]) -> tuple[str, ...]:
    """The command with its secrets hidden."""
    shown = []
    for word, flag in secret_words(command):
        if not flag:
            shown.append(_IN_A_URL.sub(rf"\1{HIDDEN}@", word))
        else:
            shown.append(f"{flag}={HIDDEN}" if word.startswith(f"{flag}=") else HIDDEN)
    return tuple(shown)
