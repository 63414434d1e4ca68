"""What the page asks for; `pd-launch trace` and `status` ask for the same.

GET /                     the page itself
GET /state                nodes, pairs, marks, figures, as of the last second
GET /events               the same each second, with the requests that ended since, as server-sent events
GET /requests             the requests that ended last
GET /requests/ID          one, by stages; 404 when it is not known (any more)
GET /nodes/NAME/log       the last lines of a node's log
GET /targets              the nodes, for Prometheus (http_sd_configs)
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse

from engines.base import JSONObject

from ..view import View, tail

OPEN_PATHS = frozenset({"/", "/targets"})
"""The page asks for the key itself; which nodes there are is in `/health`, too."""

_MOST_REQUESTS = 60
"""Of one event."""
_MOST_LISTED = 500


def add_routes(app: FastAPI, view: View) -> None:
    """To the admin listener's."""
    page = (Path(__file__).parent / "page.html").read_text()
    headers = {"content-security-policy": _policy(page), "cache-control": "no-cache", "referrer-policy": "no-referrer"}

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/state")
    async def state() -> JSONObject:
        return view.state

    @app.get("/events")
    async def events() -> Response:
        return StreamingResponse(_events(view), media_type="text/event-stream", headers={"cache-control": "no-store"})

    @app.get("/requests")
    async def requests(limit: int = 100) -> JSONObject:
        return {"requests": view.recent.last(max(1, min(limit, _MOST_LISTED)))}

    @app.get("/requests/{request_id:path}")
    async def request(request_id: str) -> JSONObject:
        view.recent.read_the_others()
        found = view.recent.find(request_id)
        if not found:
            raise HTTPException(404, f"no request {request_id!r} is among the last that were answered here")
        return {"requests": found}

    @app.get("/targets")
    async def targets() -> list[JSONObject]:
        return [
            {"targets": [urlsplit(node.spec.url).netloc], "labels": {"node": node.spec.name, "role": node.spec.role}}
            for node in view.fleet
        ]

    @app.get("/nodes/{name}/log")
    async def log(name: str) -> Response:
        file = view.log_of(name)
        if file is None:
            raise HTTPException(404, f"no log of a node {name!r} is known here")
        try:
            text = await asyncio.to_thread(tail, file)
        except OSError as exc:
            raise HTTPException(404, f"its log cannot be read: {exc.strerror}") from exc
        return PlainTextResponse(text, headers={"x-content-type-options": "nosniff"})


async def _events(view: View) -> AsyncIterator[bytes]:
    """The picture of now, then each that follows, and which requests have ended since the one before."""
    seen, state = max(0, view.recent.number - _MOST_REQUESTS), view.state
    while True:
        ended = view.recent.number
        told = state | {"requests": view.recent.last(_MOST_REQUESTS, after=seen)}
        seen = ended
        yield b"data: " + orjson.dumps(told) + b"\n\n"
        state = await view.next()


def _policy(page: str) -> str:
    """Only what is in the file itself runs, and it asks nobody but this listener."""
    scripts, styles = (
        " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
