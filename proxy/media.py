"""Media in messages, fetched once and put into the body: both legs see the same bytes, and a URL that expires or
answers differently the second time cannot make them differ. It also keeps nodes from dialling addresses that a
client chose.
"""

import asyncio
import base64
import ipaddress
import socket
from typing import Any

import httpx

from engines.base import JSONObject

from .config import ProxySettings
from .errors import BadRequestError

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
        parts = list(_remote_parts(body))
        if parts:
            urls = {part[part["type"]]["url"] for part in parts}
            fetched = dict(zip(urls, await asyncio.gather(*(self._fetch(url) for url in urls)), strict=True))
            for part in parts:
                media = part[part["type"]]
                media["url"] = fetched[media["url"]]
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


def _remote_parts(body: JSONObject) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        return []
    contents = [message["content"] for message in messages if isinstance(message, dict) and "content" in message]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if _url_of(part).startswith(("http://", "https://"))]


def _url_of(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") not in _KINDS:
        return ""
    media = part.get(part["type"])
    url = media.get("url") if isinstance(media, dict) else None
    return url if isinstance(url, str) else ""
