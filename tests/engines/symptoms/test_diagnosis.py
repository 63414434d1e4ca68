"""Several logs read as one story."""

from engines.symptoms.diagnosis import Diagnosis, Ended, diagnose
from engines.symptoms.lines import Clock
from engines.symptoms.scan import scan

NOW = 1_796_126_400.0  # 2026-12-01 12:00 UTC
BUSY = "OSError: [Errno 98] Address already in use (while attempting to bind on address ('0.0.0.0', 8900))"
DEAD = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."


def at(seconds: int, text: str, process: str = "APIServer") -> str:
    return f"({process} pid=1) ERROR 12-01 10:00:{seconds:02d} [a.py:1] {text}"


def told(ends: tuple[Ended, ...] = (), **logs: list[str]) -> Diagnosis:
    return diagnose([scan(log, ["\n".join((*lines, "")).encode()]) for log, lines in logs.items()], Clock(NOW), ends)


def first(diagnosis: Diagnosis) -> tuple[str, str]:
    assert diagnosis.first is not None
    return diagnosis.first.log, diagnosis.first.meaning.id


def test_the_first_cause_is_named_not_the_last_stack_trace() -> None:
    found = told(decode=[at(5, DEAD), at(6, DEAD)], prefill=[at(2, BUSY), at(3, DEAD)])
    assert first(found) == ("prefill", "port-bootstrap-in-use")
    assert [(hit.log, hit.times) for hit in found.consequences] == [("prefill", 1), ("decode", 2)]


def test_an_engines_own_exception_comes_before_what_its_server_says_of_it() -> None:
    """A vLLM 0.31 decode node that refused a hand-off."""
    found = told(
        decode=[
            at(1, "Traceback (most recent call last):", "EngineCore_DP0"),
            at(1, '  File "/x/scheduler.py", line 7, in finish_requests', "EngineCore_DP0"),
            at(1, "    assert req_id in self.requests", "EngineCore_DP0"),
            at(1, "AssertionError", "EngineCore_DP0"),
            at(2, "AsyncLLM output_handler failed."),
            at(2, DEAD),
        ]
    )
    assert first(found) == ("decode", "engine-refused-hand-off")
    unknown = told(
        decode=[
            at(1, "Traceback (most recent call last):", "EngineCore_DP0"),
            at(1, "ValueError: odd", "EngineCore_DP0"),
            at(2, "AsyncLLM output_handler failed."),
        ]
    )
    assert first(unknown) == ("decode", "unknown-error")


def test_of_one_failure_the_most_telling_line_is_named() -> None:
    found = told(
        decode=[
            at(1, "Traceback (most recent call last):"),
            at(1, "ConnectionRefusedError: [Errno 111] Connection refused"),
            at(1, "Failed to connect to bootstrap server http://127.0.0.1:8998 (ConnectError): x"),
        ]
    )
    assert first(found) == ("decode", "bootstrap-connect-failed")


def test_a_text_of_the_catalogue_says_more_than_the_class_of_the_exception() -> None:
    found = told(
        decode=[
            at(1, "Traceback (most recent call last):"),
            at(1, "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"),
            "  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len (2048)",
        ]
    )
    assert first(found) == ("decode", "max-model-len-too-big")


def test_a_node_that_had_failed_well_before_the_first_known_cause_is_named() -> None:
    """Its engine was killed from outside, say; that others could not reach it later is no cause of that."""
    late = at(40, "Failed to connect to bootstrap server http://127.0.0.1:8998 (ConnectError): x")
    assert first(told(prefill=[at(1, DEAD)], decode=[late])) == ("prefill", "engine-dead")
    odd = at(1, "something odd")
    assert first(told(prefill=[odd, at(2, DEAD)], decode=[late])) == ("prefill", "unknown-error")


def test_something_is_always_said_when_something_ended_badly() -> None:
    assert first(told(decode=[at(1, DEAD)])) == ("decode", "engine-dead")
    assert first(told(decode=["ValueError: odd"])) == ("decode", "unknown-error")
    killed = Ended("decode", NOW, "killed by SIGKILL")
    assert first(told((killed,), decode=["all is well"])) == ("decode", "killed-SIGKILL")
    assert first(told((Ended("decode", NOW, "exit code 1"),), decode=[])) == ("decode", "ended")
    assert told(decode=["all is well"]).first is None


def test_an_end_that_its_log_explains_is_not_told_twice() -> None:
    ended = Ended("prefill", 1_796_119_202.0, "exit code 1")
    assert [hit.meaning.id for hit in told((ended,), prefill=[at(1, BUSY)]).consequences] == []


def test_logs_of_several_zones_are_ordered_where_a_line_shows_the_zone() -> None:
    """One log was collected with docker's stamps (UTC); the other is as the node on a host in India wrote it."""
    collected = [f"2026-12-01T10:00:05.000000000Z ERROR 12-01 15:30:05 [a.py:1] {DEAD}"]
    plain = [f"ERROR 12-01 15:30:01 [a.py:1] {BUSY}"]
    found = told(decode=collected, prefill=plain)
    assert first(found) == ("prefill", "port-bootstrap-in-use")
    assert [hit.when for hit in (*found.causes, *found.consequences)] == [1_796_119_201.0, 1_796_119_205.0]


STOPPING = "(APIServer pid=1) INFO 12-01 10:00:20 [launcher.py:1] [shutdown] API server: shutdown triggered"
STARTING = "(APIServer pid=2) INFO 12-01 10:00:40 [utils.py:1] non-default args: {"


def expired(seconds: int) -> str:
    return f"I1201 10:00:{seconds:02d}.0 25742 master_service.cpp:11036] client_id=1-2, action=client_expired"


def test_what_is_said_of_a_node_that_was_asked_to_stop_is_no_failure() -> None:
    assert told(store=[expired(35)], decode=[STOPPING]) == Diagnosis()
    assert first(told(store=[expired(15)], decode=[STOPPING])) == ("store", "store-client-expired")
    assert first(told(store=[expired(45)], decode=[STOPPING, STARTING])) == ("store", "store-client-expired")


def test_what_fails_beside_a_stop_is_still_told() -> None:
    assert first(told(prefill=[at(35, BUSY)], decode=[STOPPING])) == ("prefill", "port-bootstrap-in-use")
