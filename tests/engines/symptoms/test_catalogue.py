"""The catalogue of failure texts: each entry knows its example."""

import re
import re._constants as operations  # type: ignore[import-not-found]  # what a pattern needs is not told otherwise
import re._parser as parser  # type: ignore[import-not-found]
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from engines.symptoms.catalogue import Symptom, catalogue, known


@pytest.mark.parametrize("symptom", catalogue(), ids=lambda symptom: symptom.id)
def test_every_entry_is_complete_and_recognises_its_example(symptom: Symptom) -> None:
    assert symptom.pattern.search(symptom.example)
    meant = known(symptom.example)
    assert meant is not None
    assert meant.id == symptom.id or meant.priority > symptom.priority
    assert symptom.cause
    assert symptom.fix
    assert symptom.source


def test_no_two_entries_have_one_name() -> None:
    assert Counter(symptom.id for symptom in catalogue()).most_common(1)[0][1] == 1


def test_remedies_speak_to_whoever_reads_them() -> None:
    """Not to the launcher's author; and they claim nothing that nobody does."""
    assert [s.id for s in catalogue() if re.search(r"(?i)\blauncher\b|preflight|re-match|treat (this|as)", s.fix)] == []


@pytest.mark.parametrize("symptom", catalogue(), ids=lambda symptom: symptom.id)
def test_what_is_looked_for_first_stands_in_every_line_that_the_pattern_matches(symptom: Symptom) -> None:
    assert has_one_of(parser.parse(symptom.pattern.pattern), symptom.contains)


def has_one_of(pattern: Iterable[Any], texts: tuple[str, ...]) -> bool:
    """Whether whatever matches has one of these texts in it: in a run of plain characters, or in every branch."""
    run = ""
    for operation, argument in pattern:
        if operation is operations.LITERAL:
            run += chr(argument)
            if any(text in run for text in texts):
                return True
            continue
        run = ""
        if operation is operations.SUBPATTERN and has_one_of(argument[3], texts):
            return True
        if operation is operations.BRANCH and all(has_one_of(branch, texts) for branch in argument[1]):
            return True
    return False
