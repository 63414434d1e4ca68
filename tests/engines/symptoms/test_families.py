"""Failure lines that people have reported and that the project has never met: each is named, or said to be unknown."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.symptoms.diagnosis import diagnose
from engines.symptoms.families import explained, literals
from engines.symptoms.lines import Clock
from engines.symptoms.scan import scan

REPORTED = [tuple(line.split("\t", 1)) for line in (Path(__file__).parent / "reported.txt").read_text().splitlines()]
"""What it is to be named, and the line."""


@pytest.mark.parametrize(("expected", "line"), REPORTED, ids=[f"{name}-{at}" for at, (name, _) in enumerate(REPORTED)])
def test_a_failure_from_the_field_is_named(expected: str, line: str) -> None:
    first = diagnose([scan("node", [line.encode() + b"\n"])], Clock(1.8e9)).first
    assert first is not None
    assert first.meaning.id == expected
    assert first.meaning.cause
    assert first.meaning.fix


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("error: No space left on device (28): /dev/shm/nccl-a1B2c3", "/dev/shm is full"),
        ("OSError: [Errno 28] No space left on device: '/data/hub/models--x--y/blobs/a'", "model cache is full"),
        ("OSError: [Errno 28] No space left on device: '/tmp/x'", "temporary files is full"),
        ("OSError: [Errno 28] No space left on device: '/scratch/p.log'", "the disk of /scratch/p.log is full"),
    ],
)  # fmt: skip
def test_which_disk_is_full_is_told_by_the_path_beside_the_error(line: str, place: str) -> None:
    meaning = explained(line)
    assert meaning is not None
    assert place in meaning.cause


@pytest.mark.parametrize(("_", "line"), REPORTED)
def test_a_line_that_a_family_knows_has_one_of_its_literals(_: str, line: str) -> None:
    assert explained(line) is None or any(text in line for text in literals())


@given(st.text(max_size=200))
def test_nothing_that_a_log_holds_breaks_a_family(text: str) -> None:
    meaning = explained(text)
    assert meaning is None or not re.search(r"[{}]\w+[{}]", meaning.cause + meaning.fix)
