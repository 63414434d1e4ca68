"""Media in messages, fetched once and put into the body: both legs see the same bytes, and a URL that expires or
answers differently the second time cannot make them differ. It also keeps nodes from dialling addresses that a
client chose.
"""

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import httpx

from engines.base import JSONObject

from ..errors import BadRequestError
from ..settings import ProxySettings

_KINDS = ("image_url", "audio_url", "video_url")
_DEFAULT_TYPE = "application/octet-stream"


class Media:
    """Fetches what messages point to, within limits of size, time and address."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(timeout=settings.media_timeout_s, trust_env=False, follow_redirects=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def inlined(self, body: JSONObject) -> JSONObject:
        """The body with every http(s) URL of a message's media replaced by a `data:` URL.

        The client's body is edited in place where it has such URLs. Raises BadRequestError.
        """
        places = list(_remote(body))
        if places:
            urls = {holder[key] for holder, key in places}
            fetched = dict(zip(urls, await asyncio.gather(*(self._fetch(url) for url in urls)), strict=True))
            for holder, key in places:
                holder[key] = fetched[holder[key]]
        return body

    async def _fetch(self, url: str) -> str:
        try:
            async with asyncio.timeout(self._settings.media_timeout_s):
                return await self._fetched(httpx.URL(url))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as exc:
            raise BadRequestError("media in the messages cannot be fetched", f"Reason: {type(exc).__name__}") from exc

    async def _fetched(self, url: httpx.URL) -> str:
        """Connects to the very address that was checked: a name may resolve to another one a moment later."""
        address = await self._checked_address(url)
        request = self._client.build_request(
            "GET", url.copy_with(host=address), headers={"Host": url.netloc.decode("ascii"), "Accept": "*/*"},
            extensions={"sni_hostname": url.host},
        )  # fmt: skip
        answer = await self._client.send(request, stream=True)
        try:
            if answer.status_code != httpx.codes.OK:
                raise BadRequestError(f"media in the messages cannot be fetched: its server says {answer.status_code}")
            data = bytearray()
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > self._settings.max_media_bytes:
                    raise BadRequestError(
                        f"media in the messages is larger than {self._settings.max_media_bytes} bytes"
                    )
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


def _remote(body: JSONObject) -> Iterator[tuple[JSONObject, str]]:
    """(object, key) of every http(s) URL that a node would fetch, in the shapes vLLM knows.

    `{"image_url": {"url": …}}` and `{"image_url": …}`, with a type or without, in chat and responses, and
    `{"source": {"url": …}}` in messages (vllm/renderers/chat_utils.py, entrypoints/anthropic/serving.py).
    """
    for message in (*_objects(body.get("messages")), *_objects(body.get("input"))):
        for block in (*_blocks(message.get("content")), *_blocks(message.get("output"))):
            for holder, key in _places(block):
                url = holder.get(key)
                if isinstance(url, str) and url[:8].lower().lstrip().startswith("http"):
                    yield holder, key


def _blocks(content: Any) -> Iterator[JSONObject]:
    """The blocks of a message's content, and those within them: of a tool's result."""
    for block in _objects(content):
        yield block
        yield from _blocks(block.get("content"))


def _places(block: JSONObject) -> Iterator[tuple[JSONObject, str]]:
    for kind in _KINDS:
        media = block.get(kind)
        yield (media, "url") if isinstance(media, dict) else (block, kind)
    source = block.get("source")
    if isinstance(source, dict):
        yield source, "url"


def _objects(value: Any) -> list[JSONObject]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
