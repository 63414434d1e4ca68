"""One request on the screen, as a time line."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from ..inspect.trace import Traced

_BAR = 28
_LINE_WIDTH = 160
_COLOURS = {
    "queue": "bright_black", "read": "bright_black", "prefill": "blue", "hand-off": "yellow", "aggregated": "magenta",
    "decode": "green", "resume": "cyan", "release": "cyan",
}  # fmt: skip


def show(console: Console, found: Traced) -> None:
    """What the proxy remembers, then the logs' lines."""
    if not found.requests:
        console.print(Text(f"{found.request_id}: {found.problem}"), soft_wrap=True)
    for request in found.requests:
        _request(console, request)
    if found.lines:
        console.print(Text(f"\nin the logs ({len(found.lines)} lines)", style="bold"))
    for line in found.lines:
        console.print(Text(f"{line.log}: {line.text[:_LINE_WIDTH]}"), soft_wrap=True)


def _request(console: Console, request: dict[str, Any]) -> None:
    at = datetime.fromtimestamp(request["at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    console.print(Text(request["request_id"], style="bold"), soft_wrap=True)
    for line in (f"{at}  {request['route']}  {request['model']}", _outcome(request), *_notes(request)):
        console.print(Text(line), soft_wrap=True)
    whole = max([request["seconds"], *(stage["began"] + stage["seconds"] for stage in request["stages"])])
    names = max([len(stage.get("node", "")) for stage in request["stages"]], default=0)
    for stage in request["stages"]:
        colour = _COLOURS.get(stage["name"], "")
        console.print(
            Text.assemble(
                f"{_seconds(stage['began']):>8}  ", (f"{stage['name']:<10}", colour),
                f"  {stage.get('node', ''):<{names}}  {_seconds(stage['seconds']):>8}  ", (_bar(stage, whole), colour),
            ),
            soft_wrap=True,
        )  # fmt: skip
        for note in _of_stage(stage):
            console.print(
                Text(f"{'':10}{note}", style="red" if note == stage.get("problem") else "dim"), soft_wrap=True
            )


def _outcome(request: dict[str, Any]) -> str:
    words = "running" if request["running"] else "client left" if request["status"] == 499 else str(request["status"])
    way = request["path"] + (f" ({request['reason']})" if request.get("reason") else "")
    first = request.get("first_event_s")
    tokens = [
        f"{request[key]} tokens {what}"
        for key, what in (("prompt_tokens", "of prompt"), ("output_tokens", "of answer"))
        if request.get(key)
    ]
    times = f"{_seconds(request['seconds'])} in all" + (f", first event after {_seconds(first)}" if first else "")
    return "; ".join([words, way, times, *tokens])


def _notes(request: dict[str, Any]) -> Iterator[str]:
    if request.get("retries"):
        yield f"tried again {request['retries']} times"
    if request.get("resumed"):
        yield f"went on from another node {request['resumed']} times"
    if request.get("failures"):
        yield f"failed: {', '.join(request['failures'])}"
    if request.get("error"):
        yield f"error: {request['error']}"


def _of_stage(stage: dict[str, Any]) -> Iterator[str]:
    if stage.get("problem"):
        yield stage["problem"]
    notes = [f"attempt {stage['attempt']}"] if stage.get("attempt", 1) > 1 else []
    notes += [f"sequence {stage['part']}"] if stage.get("part") else []
    if "cached" in stage:
        predicted = f", {stage['predicted']} predicted" if "predicted" in stage else ""
        notes.append(f"{stage['cached']} of {stage.get('tokens', 0)} tokens cached{predicted}")
    notes += [f"{stage['bytes']} bytes"] if stage.get("bytes") else []
    notes += [f"KV {stage['kv']}"] if stage.get("kv") else []
    notes += ["not over yet"] if stage.get("running") else []
    if notes:
        yield "; ".join(notes)


def _bar(stage: dict[str, Any], whole: float) -> str:
    begins = min(round(_BAR * stage["began"] / whole) if whole else 0, _BAR - 1)
    length = max(1, round(_BAR * stage["seconds"] / whole) if whole else 1)
    return " " * begins + "■" * min(length, _BAR - begins)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
