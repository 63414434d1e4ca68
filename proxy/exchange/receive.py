"""The client's request: its body parsed once, and what it points to fetched."""

from engines.openai.request import Asked, InvalidBodyError, asked

from ..errors import BadRequestError
from .media import Media
from .memory import Reservation
from .parsing import Parser


class Receiver:
    """Makes requests of bodies."""

    def __init__(self, parser: Parser, media: Media) -> None:
        self._parser = parser
        self._media = media

    async def asked(self, path: str, raw: bytes, memory: Reservation) -> Asked:
        """What a client wants. Raises BadRequestError, OverloadedError; what is fetched is counted in `memory`."""
        try:
            if not self._parser.is_quick(raw):
                return await self._parser.parse(path, raw)
            found = asked(path, raw)
        except InvalidBodyError as exc:
            raise BadRequestError(str(exc), param=exc.param) from exc
        await self._media.inline(found.body, memory)
        return found

    async def close(self) -> None:
        self._parser.close()
        await self._media.close()
