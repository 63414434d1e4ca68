"""The catalogue of failure texts: each entry knows its example, and several logs are read as one story."""

import re
from collections import Counter

import pytest

from engines.symptoms import Line, Symptom, catalogue, diagnose, recognised, when


@pytest.mark.parametrize("symptom", catalogue(), ids=lambda symptom: symptom.id)
def test_every_entry_is_complete_and_recognises_its_example(symptom: Symptom) -> None:
    assert symptom.pattern.search(symptom.example)
    assert symptom.contains in symptom.example
    meant = recognised(symptom.example)
    assert meant is not None
    assert meant.id == symptom.id or meant.priority > symptom.priority
    assert symptom.cause
    assert symptom.fix
    assert symptom.source


def test_no_two_entries_have_one_name() -> None:
    assert Counter(symptom.id for symptom in catalogue()).most_common(1)[0][1] == 1


def test_the_part_looked_for_first_is_in_every_line_that_a_pattern_matches() -> None:
    """Unless the pattern has alternatives, the part stands in it as it is."""
    for symptom in catalogue():
        plain = re.sub(r"\\(.)", r"\1", symptom.pattern.pattern)
        assert symptom.contains in plain


def line(log: str, number: int, at: float, text: str) -> Line:
    return Line(log, number, (11, 23, at), text)


BUSY = "OSError: [Errno 98] Address already in use (while attempting to bind on address ('0.0.0.0', 8900))"
DEAD = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."


def test_the_first_cause_is_named_not_the_last_stack_trace() -> None:
    story = [
        line("decode-0", 7, 5.0, DEAD),
        line("prefill-0", 3, 2.0, BUSY),
        line(
            "prefill-0",
            9,
            3.0,
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        ),
        line("decode-0", 9, 6.0, DEAD),
    ]
    found = diagnose(story)
    assert found.first is not None
    assert (found.first.line.log, found.first.symptom.id) == ("prefill-0", "port-bootstrap-in-use")
    assert [(hit.line.log, hit.times) for hit in found.consequences] == [("prefill-0", 1), ("decode-0", 2)]


def test_a_consequence_alone_is_better_than_nothing() -> None:
    first = diagnose([line("decode-0", 1, 1.0, DEAD)]).first
    assert first is not None
    assert first.symptom.id == "engine-dead"


def test_what_only_looks_like_an_error_is_none() -> None:
    noise = [symptom for symptom in catalogue() if symptom.kind in ("noise", "fact")]
    assert len(noise) > 10
    found = diagnose(line("x", number, 1.0, symptom.example) for number, symptom in enumerate(noise))
    assert found.first is None
    assert found.remarks == ()


def test_what_a_node_says_while_it_is_stopped_is_no_failure_and_what_its_next_life_says_may_be() -> None:
    stop = "INFO 11-23 03:36:12 [launcher.py:254] [shutdown] API server: shutdown triggered"
    start = "INFO 11-23 03:37:20 [api_utils.py:286] non-default args: {'port': 8101}"
    assert diagnose([line("x", 1, 1.0, stop), line("x", 2, 2.0, DEAD)]).first is None
    again = diagnose([line("x", 1, 1.0, stop), line("x", 2, 2.0, start), line("x", 3, 3.0, DEAD)])
    assert again.first is not None
    other = diagnose([line("x", 1, 1.0, stop), line("y", 2, 2.0, DEAD)]).first
    assert other is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("INFO 11-22 05:02:01 [core.py:77] x", (11, 22, 18121.0)),
        ("(Worker pid=29326) ERROR 11-22 05:02:01 [multiproc_executor.py:1063] x", (11, 22, 18121.0)),
        ("E1130 22:13:07.333177   721 rdma_endpoint.cpp:425] x", (11, 30, 79987.333177)),
        ("I20261130 22:13:07.333177   721 rdma_endpoint.cpp:425] x", (11, 30, 79987.333177)),
        ("2026-11-23 03:01:02,500 INFO pd_proxy: x", (11, 23, 10862.5)),
        ("Traceback (most recent call last):", None),
        ("", None),
    ],
)
def test_the_time_of_a_line_is_read_in_every_writers_form(text: str, expected: tuple[float, ...] | None) -> None:
    assert when(text) == expected
