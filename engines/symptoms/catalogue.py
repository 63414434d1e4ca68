"""Known texts: `catalogue.json`, one entry a text, each with an example line and the source it is known from."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from .meaning import Meaning


@dataclass(frozen=True, slots=True)
class Symptom(Meaning):
    """One known text."""

    priority: int
    """Of several entries that match a line, the highest is meant."""
    pattern: re.Pattern[str]
    contains: tuple[str, ...]
    """One of these stands in every line that the pattern matches: looking for them first is what makes it quick."""
    needs: tuple[str, ...]
    """A conditional one counts only where its log has one of these texts, too."""
    example: str
    example_origin: str
    source: str


@cache
def catalogue() -> tuple[Symptom, ...]:
    """Every known text, the most telling first."""
    entries = json.loads(files(__package__).joinpath("catalogue.json").read_text())
    return tuple(sorted(map(_symptom, entries), key=lambda symptom: -symptom.priority))


def known(text: str) -> Symptom | None:
    """What a line means, if it is known."""
    for symptom in catalogue():
        if any(part in text for part in symptom.contains) and symptom.pattern.search(text):
            return symptom
    return None


def _symptom(entry: dict[str, Any]) -> Symptom:
    texts = {"contains": tuple(entry["contains"]), "needs": tuple(entry.get("needs", ()))}
    return Symptom(**entry | texts | {"pattern": re.compile(entry["pattern"])})
