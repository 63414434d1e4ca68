"""Media that a request points to, fetched once and put into the body: both legs see the same bytes, and a URL that
expires or answers differently the second time cannot make them differ. It also keeps nodes from dialling addresses
that a client chose, on whatever route and in whatever shape the client names them.
"""

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from engines.base import JSONObject

from ..errors import BadRequestError
from ..settings import ProxySettings
from .memory import Reservation

_KINDS = ("image_url", "audio_url", "video_url")
_NAMES_MEDIA = frozenset({*_KINDS, "source"})
_CONTAINERS = (dict, list)
_NO_MEDIA_IN = frozenset(
    {
        "prompt",
        "tools",
        "functions",
        "response_format",
        "structured_outputs",
        "guided_json",
        "metadata",
        "documents",
        "chat_template_kwargs",
    }
)
"""Text and token ids; and whose words are the client's own: a schema may call a field `image_url`."""
_MOST_OBJECTS = 50_000
_AT_ONCE = 4
_DEFAULT_TYPE = "application/octet-stream"
_COPIES = 3
"""Of what is fetched: the bytes, their base64, and that in a leg's body."""

Place = tuple[Any, str | int]


class Media:
    """Fetches what requests point to, within limits of number, size, time and address for all media of a request."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(timeout=settings.media_timeout_s, trust_env=False, follow_redirects=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def inline(self, body: JSONObject, memory: Reservation) -> None:
        """Replace every http(s) URL that a node would fetch by a `data:` URL.

        Raises BadRequestError, OverloadedError.
        """
        places = list(remote_media(body, most_objects=_MOST_OBJECTS))
        if not places:
            return
        urls = list(dict.fromkeys(holder[key] for holder, key in places))
        if len(urls) > self._settings.max_media_count:
            raise BadRequestError(f"the request names {len(urls)} media, more than {self._settings.max_media_count}")
        fetched = await self._fetch_all(urls, memory)
        for holder, key in places:
            holder[key] = fetched[holder[key]]

    async def _fetch_all(self, urls: list[str], memory: Reservation) -> dict[str, str]:
        download = _Download(self._settings.max_media_bytes, memory)
        places = asyncio.Semaphore(_AT_ONCE)

        async def fetch(url: str) -> str:
            async with places:
                return await self._fetched(httpx.URL(url), download)

        tasks = [asyncio.create_task(fetch(url), name="fetch of media") for url in urls]
        try:
            async with asyncio.timeout(self._settings.media_timeout_s):
                return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
        except TimeoutError as exc:
            limit_s = self._settings.media_timeout_s
            raise BadRequestError(f"media in the messages could not be fetched in {limit_s:g} s") from exc
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as exc:
            raise BadRequestError("media in the messages cannot be fetched", f"Reason: {type(exc).__name__}") from exc
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetched(self, url: httpx.URL, download: "_Download") -> str:
        """Connects to the very address that was checked: a name may resolve to another one a moment later."""
        address = await self._checked_address(url)
        request = self._client.build_request(
            "GET", url.copy_with(host=address),
            headers={"Host": url.netloc.decode("ascii"), "Accept": "*/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.host},
        )  # fmt: skip
        answer = await self._client.send(request, stream=True)
        try:
            if answer.status_code != httpx.codes.OK:
                raise BadRequestError(f"media in the messages cannot be fetched: its server says {answer.status_code}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise BadRequestError("media in the messages is compressed by its server, unasked")
            data = bytearray()
            async for chunk in answer.aiter_raw():
                download.count(len(chunk))
                data += chunk
        finally:
            await answer.aclose()
        kind = answer.headers.get("content-type", _DEFAULT_TYPE).split(";", 1)[0].strip()
        return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"

    async def _checked_address(self, url: httpx.URL) -> str:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(url.host, url.port or 80, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not self._settings.allow_private_media and not all(ipaddress.ip_address(a).is_global for a in addresses):
            raise BadRequestError(
                "media in the messages is at a private address",
                "Start the proxy with --allow-private-media to allow it",
            )
        return addresses[0]


class _Download:
    """All that is fetched for one request."""

    def __init__(self, most_bytes: int, memory: Reservation) -> None:
        self._most = most_bytes
        self._memory = memory
        self._size = 0

    def count(self, size: int) -> None:
        """Raises BadRequestError, OverloadedError."""
        self._size += size
        if self._size > self._most:
            raise BadRequestError(f"the request's media are larger than {self._most} bytes")
        self._memory.add(size * _COPIES)


def remote_media(body: JSONObject, most_objects: int | None) -> Iterator[Place]:
    """(holder, key) of every http(s) URL that a node would fetch, wherever in the body it stands.

    `{"image_url": {"url": …}}` and `{"image_url": …}`, with a type or without, and `{"source": {"url": …}}`: in the
    messages of chat, of its batches, of responses, and in what is scored, ranked or embedded
    (vllm/renderers/chat_utils.py, entrypoints/anthropic/serving.py, entrypoints/pooling/scoring). Raises
    BadRequestError when there is too much to look through.
    """
    todo: list[Any] = [
        value for key, value in body.items() if isinstance(value, _CONTAINERS) and key not in _NO_MEDIA_IN
    ]
    seen = 0
    while todo:
        value = todo.pop()
        inner: Iterable[Any] = value
        if isinstance(value, dict):
            if not _NAMES_MEDIA.isdisjoint(value):
                yield from _places(value)
            inner = value.values()
        todo += [each for each in inner if isinstance(each, _CONTAINERS)]
        seen += 1
        if most_objects is not None and seen > most_objects:
            raise BadRequestError(f"a request may have at most {most_objects} objects in its messages")


def _places(block: JSONObject) -> Iterator[Place]:
    for kind in _KINDS:
        media = block.get(kind)
        if isinstance(media, str) and _is_remote(media):
            yield block, kind
        elif isinstance(media, dict) and isinstance(media.get("url"), str) and _is_remote(media["url"]):
            yield media, "url"
    source = block.get("source")
    if isinstance(source, dict) and isinstance(source.get("url"), str) and _is_remote(source["url"]):
        yield source, "url"


def _is_remote(url: str) -> bool:
    return url[:16].lstrip().lower().startswith("http")
