"""The catalogue's texts against the installed engine: what is said to come from vLLM stands in its source."""

import re

import pytest

from engines.symptoms.catalogue import Symptom, catalogue
from launcher.setup.install import EngineEnvironment

IN_PIECES = re.compile(r"""["']\s*\n\s*[fr]?["']""")
"""Where a string goes on in the next line."""
FROM_VLLM = [
    symptom
    for symptom in catalogue()
    if symptom.source.lower().startswith("vllm ") and not symptom.example_origin.startswith("quoted from the cited")
]


@pytest.fixture(scope="module")
def source() -> str:
    (package,) = EngineEnvironment.of("cpu").folder.glob("lib/python3*/site-packages/vllm")
    return IN_PIECES.sub("", "\n".join(file.read_text(errors="replace") for file in package.rglob("*.py")))


def test_most_of_the_catalogue_that_names_vllm_can_be_checked() -> None:
    assert len(FROM_VLLM) > 40


@pytest.mark.parametrize("symptom", FROM_VLLM, ids=lambda symptom: symptom.id)
def test_a_text_that_is_vllms_stands_in_its_source(source: str, symptom: Symptom) -> None:
    assert any(part.strip() in source for part in symptom.contains)
