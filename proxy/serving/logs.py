"""Log lines: for people, or as JSON for machines. No prompt, no answer and no key is ever in one."""

import json
import logging
import math
import sys
import time
from typing import Any, Literal

from ..exchange.record import Record

logger = logging.getLogger("pd_proxy.requests")

_REFUSALS_LOGGED_EVERY_S = 1.0


def configure(form: Literal["text", "json"]) -> None:
    """Once, at the start of a process. What cannot be written is dropped: a full disk stops no request."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JSONFormatter() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.raiseExceptions = False


class Refusals:
    """The lines of requests that are refused on their head: one a second for each status. A flood of them costs its
    senders nothing, and would fill the disk. The next line says how many had none.
    """

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        """When the last line of a status was written, on the record's clock."""
        self._not_logged: dict[int, int] = {}
        """How many there have been since."""

    def log(self, record: Record) -> None:
        status, now = record.status, record.ended
        if now - self._last.get(status, -math.inf) < _REFUSALS_LOGGED_EVERY_S:
            self._not_logged[status] = self._not_logged.get(status, 0) + 1
            return
        self._last[status] = now
        request(record, not_logged=self._not_logged.pop(status, 0))


def request(record: Record, *, not_logged: int = 0) -> None:
    """One line for one request: what it was, which way it took, how long each stage was, how it ended.

    `not_logged`: how many refused like it have no line.
    """
    fields = {**fields_of(record), "not_logged": not_logged or None}
    words = " ".join(f"{name}={_word(value)}" for name, value in fields.items() if value not in (None, []))
    logger.log(logging.WARNING if record.status >= 500 else logging.INFO, words, extra={"fields": fields})


def fields_of(record: Record) -> dict[str, Any]:
    """What is told of a request wherever it is told."""
    spent = record.spent()
    return {
        "request_id": record.request_id,
        "route": record.route,
        "status": record.status,
        "seconds": round(record.seconds, 4),
        "path": record.path,
        "reason": record.reason,
        "key": record.key_name or None,
        "nodes": record.nodes,
        "queue_s": round(spent.get("queue", 0.0), 4) or None,
        "prefill_s": round(spent.get("prefill", 0.0), 4) or None,
        "hand_off_s": round(spent.get("hand-off", 0.0), 4) or None,
        "first_event_s": round(record.first_event_s, 4) or None,
        "prompt_tokens": record.prompt_tokens or None,
        "output_tokens": record.output_tokens or None,
        "transfer_id": record.transfer_id,
        "failures": record.failures,
        "retries": record.retries or None,
        "resumed": record.resumed or None,
        "error": record.error or None,
    }


def _word(value: object) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, str) and " " in value else str(value)


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
