"""One log, looked through."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engines.symptoms.catalogue import catalogue
from engines.symptoms.scan import UNKNOWN, Found, scan

BUSY = "OSError: [Errno 98] Address already in use (while attempting to bind on address ('0.0.0.0', 8900))"
DEAD = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
STOP = "INFO 11-23 03:36:12 [launcher.py:254] [shutdown] API server: shutdown triggered"
START = "INFO 11-23 03:37:20 [api_utils.py:286] non-default args: {'port': 8101}"


def found(*lines: str) -> list[Found]:
    return scan("node", ["\n".join((*lines, "")).encode()]).found


def ids(*lines: str) -> list[str]:
    return [one.meaning.id for one in found(*lines)]


def test_a_line_is_told_once_with_its_number_and_how_often_it_was_there() -> None:
    (one,) = found("all is well", BUSY, "all is well", BUSY, BUSY)
    assert (one.number, one.times, one.text) == (2, 3, BUSY)


def test_lines_are_counted_also_where_they_are_no_longer_read() -> None:
    (one,) = found(*(f"{BUSY[:-7]}{port}))" for port in range(1000, 1500)))
    assert one.times == 500


@given(st.lists(st.integers(0, 5), max_size=4))
def test_however_a_log_is_read_in_parts_the_same_is_found(cuts: list[int]) -> None:
    lines = [START, "noise", BUSY, "more", DEAD, "end"]
    edges = [0, *sorted(set(cuts)), len(lines)]
    parts = ["".join(f"{line}\n" for line in lines[a:b]).encode() for a, b in pairwise(edges)]
    assert [(f.number, f.meaning.id) for f in scan("node", parts).found] == [
        (3, "port-bootstrap-in-use"),
        (5, "engine-dead"),
    ]


def test_lines_that_differ_in_their_digits_only_may_mean_two_things() -> None:
    assert ids("exited with code 120", "exited with code 137") == ["killed-SIGKILL"]


def test_what_a_node_says_while_it_is_stopped_is_no_failure_and_what_its_next_life_says_may_be() -> None:
    assert ids(STOP, DEAD) == []
    assert ids(STOP, DEAD, START, DEAD) == ["engine-dead"]
    master = "I1126 14:56:51.198335 15430 master.cpp:1683] Shutdown signal received, exiting gracefully"
    gone = "I1126 14:56:51.198768 15436 master_service.cpp:2619] Task cleanup thread stopped"
    assert ids(master, gone) == []
    assert ids(gone) == ["master-rpc-port-silent"]


def test_the_configuration_that_an_engine_tells_when_it_dies_is_no_failure() -> None:
    dump = (
        "(EngineCore pid=7) ERROR 11-26 22:45:12 [dump_input.py:72] Dumping input data for V1 LLM engine with "
        "config: model='/m', tokenizer='/m', trust_remote_code=False, load_format=auto, kv_load_failure_policy='fail'"
    )
    death = "(Worker pid=8) ERROR 11-26 22:45:12 [multiproc_executor.py:1063] AssertionError: CPU GDN requires BF16."
    (one,) = found(death, dump)
    assert one.text == death
    assert ids("ValueError: Please pass the argument `trust_remote_code=True` to allow custom code") == ["remote-code"]


def test_one_log_of_several_nodes_is_read_as_theirs() -> None:
    told = found(f"prefill-0  | {STOP}", f"prefill-0  | {DEAD}", f"decode-0   | {DEAD}")
    assert [one.log for one in told] == ["node: decode-0"]


def test_an_exception_that_nobody_knows_is_told_with_its_place() -> None:
    (one,) = found(
        "(EngineCore pid=7) ERROR 11-25 10:00:01 [core.py:900] EngineCore hit a snag.",
        "(EngineCore pid=7) ERROR 11-25 10:00:01 [core.py:900] Traceback (most recent call last):",
        '(EngineCore pid=7) ERROR 11-25 10:00:01 [core.py:900]   File "/x/scheduler.py", line 77, in update',
        "(EngineCore pid=7) ERROR 11-25 10:00:01 [core.py:900]     assert odd in self.things",
        "(EngineCore pid=7) ERROR 11-25 10:00:01 [core.py:900]            ^^^^^^^^^^^^^^^^^^",
        "(EngineCore pid=7) ERROR 11-25 10:00:01 [core.py:900] AssertionError",
    )[1:]
    assert one.meaning is UNKNOWN
    assert one.is_grave
    assert "scheduler.py:77 in update: assert odd in self.things" in one.text


def test_one_requests_exception_is_not_taken_for_the_nodes_end() -> None:
    told = found(
        "ERROR:    Exception in ASGI application", "Traceback (most recent call last):", "  x", "ValueError: odd"
    )
    assert [(one.meaning.id, one.is_grave) for one in told] == [("asgi-exception", True), ("unknown-error", False)]


def test_an_exception_that_came_of_one_requests_is_that_requests_too() -> None:
    """As a real node tells it when a stream is refused after its beginning."""
    told = found(
        "ERROR:    Exception in ASGI application", "Traceback (most recent call last):", "  x", "OddError: odd", "",
        "The above exception was the direct cause of the following exception:", "",
        "Traceback (most recent call last):", "  y",
        "RuntimeError: Caught handled exception, but response already started.", "Traceback (most recent call last):",
        "  z", "KeyError: of the engine",
    )  # fmt: skip
    assert [(one.meaning.id, one.is_grave) for one in told] == [
        ("asgi-exception", True), ("unknown-error", False), ("unknown-error", False), ("unknown-error", True),
    ]  # fmt: skip


def test_what_a_client_did_wrong_is_no_failure_of_the_node() -> None:
    """As a real node tells it, at level ERROR and with a traceback."""
    at = "(APIServer pid=7) ERROR 11-26 15:58:47 [serving.py:500] "
    refused = ("Error in completion stream generator.", "Traceback (most recent call last):",
               '  File "/x/sampling_params.py", line 7, in verify', "    raise VLLMValidationError(",
               "vllm.exceptions.VLLMValidationError: Requested sample logprobs of 30 (parameter=logprobs)")  # fmt: skip
    assert ids(*(at + line for line in refused)) == []
    odd = ("Error in completion stream generator.", "Traceback (most recent call last):", "ValueError: odd")
    assert [one.is_grave for one in found(*(at + line for line in odd))] == [False]


def test_what_is_quiet_is_not_searched_for_words_of_failures() -> None:
    assert ids("INFO 11-23 03:36:12 [logger.py:1] Received request c-1: prompt: 'CUDA error: out of memory'") == []
    assert ids("INFO 11-23 03:36:12 [a.py:1] No space left on device (28) is what would be bad") == []
    assert (
        ids('(APIServer pid=7) INFO:     10.0.0.1:5 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error') == []
    )


def test_no_adapter_is_a_cause_only_where_one_was_asked_for() -> None:
    gone = "W1126 14:56:51.198768 15436 rdma.cpp:2] No RDMA devices found, check your device installation"
    asked = "INFO 11-23 03:37:20 [api_utils.py:286] non-default args: {'extra': {'mooncake_protocol': 'rdma'}}"
    assert ids(gone) == []
    (one,) = found(asked, gone)
    assert (one.meaning.id, one.meaning.kind) == ("rdma-no-device", "root")


def test_what_only_looks_like_an_error_is_none() -> None:
    quiet = [symptom for symptom in catalogue() if symptom.kind in ("noise", "fact")]
    assert len(quiet) > 10
    assert ids(*(symptom.example for symptom in quiet)) == []


@given(st.binary(max_size=400))
def test_any_bytes_are_a_log(data: bytes) -> None:
    scan("node", [data])
