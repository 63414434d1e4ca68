"""What a line means: whose fault it tells of, why, and what to do."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["root", "hang", "symptom", "config", "warn", "conditional", "noise", "fact", "stop", "start"]

CAUSES: frozenset[Kind] = frozenset({"root", "hang"})
"""Kinds that say why something failed; the others say that it did, or nothing."""
CONSEQUENCES: frozenset[Kind] = frozenset({"symptom"})
REMARKS: frozenset[Kind] = frozenset({"config", "warn"})
"""Worth a word, though a node with such a line may be well."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of one kind of line."""

    id: str
    kind: Kind
    root: str
    """Where the cause is: self (the node that says it), prefill, decode, master, config, network, install, os ..."""
    cause: str
    fix: str
