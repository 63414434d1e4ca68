"""Log lines: for people, or as JSON for machines. No prompt, no answer and no key is ever in one."""

import json
import logging
import sys
import time
from typing import Literal

from ..exchange.record import Record

logger = logging.getLogger("pd_proxy.requests")


def configure(form: Literal["text", "json"]) -> None:
    """Once, at the start of a process. What cannot be written is dropped: a full disk stops no request."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JSONFormatter() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.raiseExceptions = False


def request(record: Record, error: str) -> None:
    """One line for one request: what it was, which way it took, how long each stage was, how it ended."""
    fields = {
        "request_id": record.request_id,
        "route": record.route,
        "status": record.status,
        "seconds": round(record.seconds, 4),
        "path": record.path,
        "reason": record.reason,
        "key": record.key_name or None,
        "nodes": record.nodes,
        "queue_s": round(record.queue_s, 4) or None,
        "prefill_s": round(record.prefill_s, 4) or None,
        "hand_off_s": round(record.hand_off_s, 4) or None,
        "first_event_s": round(record.first_event_s, 4) or None,
        "prompt_tokens": record.prompt_tokens or None,
        "output_tokens": record.output_tokens or None,
        "transfer_id": record.transfer_id,
        "failures": record.failures,
        "retries": record.retries or None,
        "resumed": record.resumed or None,
        "error": error or None,
    }
    words = " ".join(f"{name}={_word(value)}" for name, value in fields.items() if value not in (None, []))
    logger.log(logging.WARNING if record.status >= 500 else logging.INFO, words, extra={"fields": fields})


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
