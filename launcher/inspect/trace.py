"""One request: what the proxy remembers of it, and the lines of all logs that name it."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import quote

import httpx

from ..errors import ConfigError
from . import logs
from .logs import Line
from .runs import RunFolder, RunState, phase_of
from .status import admin_headers

_TIMEOUT_S = 3
_MOST_LINES = 100


@dataclass
class Traced:
    """What is known under an id: a client may use one twice."""

    request_id: str
    problem: str = ""
    """Why the proxy says nothing of it."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """As the proxy's admin listener tells them, the latest first."""
    lines: list[Line] = field(default_factory=list)
    """Of the proxy's log and the nodes', the first of them."""


def of(run: RunFolder, request_id: str) -> Traced:
    """Raises ConfigError when nothing is known of the run."""
    state = run.read()
    if state is None:
        raise ConfigError(f"nothing is known of a run in {run.path}")
    found = Traced(request_id)
    if phase_of(run, state) in ("starting", "ready", "stopping"):
        _ask(found, state)
    else:
        found.problem = "the run is over, and with it what its proxy remembered"
    ids = [request_id, *(transfer for one in found.requests for transfer in _transfers(one))]
    pattern = re.compile("|".join(map(re.escape, ids)))
    lines = logs.wanted(logs.time_line(logs.files_of(run.path)), float("-inf"), pattern)
    found.lines = list(islice(lines, _MOST_LINES))
    return found


def _ask(found: Traced, state: RunState) -> None:
    url = f"{state.admin_url}/requests/{quote(found.request_id, safe='')}"
    try:
        answer = httpx.get(url, headers=admin_headers(state), timeout=_TIMEOUT_S, trust_env=False)
        if answer.status_code == 200:
            found.requests = answer.json()["requests"]
        else:
            found.problem = answer.json()["error"]["message"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as exc:
        found.problem = f"the proxy does not answer: {exc}"


def _transfers(request: dict[str, Any]) -> Iterable[str]:
    return (request.get("transfer_id") or "").split(",") if request.get("transfer_id") else ()


def as_data(found: Traced) -> dict[str, Any]:
    """For `--json`."""
    return asdict(found)
