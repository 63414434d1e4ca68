"""One request on the screen, from what a proxy remembers and the logs say."""

import io
from typing import Any

from rich.console import Console

from launcher.cli import show_trace
from launcher.inspect.logs import Line
from launcher.inspect.trace import Traced

REQUEST: dict[str, Any] = {
    "request_id": "r-1", "route": "/v1/chat/completions", "model": "m", "at": 1_795_828_867.6, "status": 200,
    "path": "disaggregated", "reason": None, "running": False, "seconds": 2.5, "first_event_s": 1.25,
    "prompt_tokens": 300, "output_tokens": 40, "retries": 1, "failures": ["prefill-0:unreachable"], "attempts": 2,
    "stages": [
        {"name": "queue", "attempt": 0, "began": 0.0, "seconds": 0.0001},
        {"name": "prefill", "node": "prefill-0", "attempt": 1, "began": 0.001, "seconds": 0.2, "problem": "late"},
        {
            "name": "prefill", "node": "prefill-1", "attempt": 2, "began": 0.201, "seconds": 1.0, "tokens": 300,
            "cached": 256, "predicted": 272, "kv": "taken",
        },
        {"name": "hand-off", "node": "decode-0", "attempt": 2, "began": 1.201, "seconds": 0.049},
        {"name": "decode", "node": "decode-0", "attempt": 2, "began": 1.25, "seconds": 1.25},
    ],
}  # fmt: skip


def shown(found: Traced) -> list[str]:
    output = io.StringIO()
    show_trace.show(Console(file=output, width=80), found)
    return output.getvalue().splitlines()


def test_a_request_is_a_time_line_with_what_went_wrong_and_what_was_done() -> None:
    lines = shown(Traced("r-1", requests=[REQUEST], lines=[Line("prefill-0", 7, 0.0, "r-1 aborted")]))
    told = "\n".join(line.rstrip() for line in lines)
    rows = [line for line in lines if "■" in line]
    assert max(map(len, rows)) <= 80
    assert "200; disaggregated; 2.50 s in all, first event after 1.25 s; 300 tokens of prompt; 40 tokens of answer" in (
        " ".join(told.split())
    )
    assert "tried again 1 times" in told
    assert "failed: prefill-0:unreachable" in told
    assert [row.split()[2] for row in rows] == ["queue", "prefill", "prefill", "hand-off", "decode"]
    assert "attempt 2; 256 of 300 tokens cached, 272 predicted; KV taken" in told
    bars = [line.rindex("■") - line.index("■") + 1 for line in rows]
    assert bars[-1] == 14, "half of the time is half of the bar"
    assert "prefill-0: r-1 aborted" in told


def test_what_the_proxy_does_not_know_may_be_in_the_logs() -> None:
    lines = shown(Traced("r-2", problem="the run is over", lines=[Line("decode-0", 1, 0.0, "r-2 died")]))
    assert lines[0] == "r-2: the run is over"
    assert lines[-1] == "decode-0: r-2 died"


def test_a_request_under_way_has_stages_that_are_not_over() -> None:
    stage = {"name": "prefill", "node": "p", "attempt": 1, "began": 0.1, "seconds": 4.0, "running": True}
    lines = shown(Traced("r", requests=[REQUEST | {"running": True, "stages": [stage]}]))
    assert any("not over yet" in line for line in lines)
    assert any(line.startswith("running; ") for line in lines)
