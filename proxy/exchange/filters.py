"""What a stream's bytes go through between its node and its client."""

from typing import Protocol

from engines.openai.continuation import ERROR_EVENT

from ..upstream.client import are_whole_frames


class Through(Protocol):
    """One stream's; `SentTokens` is one that could go on after a failure."""

    @property
    def has_failed(self) -> bool:
        """The node has sent an error as an event. The client gets nothing of it, nor of what comes after."""

    @property
    def is_done(self) -> bool:
        """The stream may end here."""

    def in_frames(self, data: bytes) -> bytes | None:
        """Whole HTTP chunks that may pass as chunks; None when a parser must look at them, and then `feed`."""

    def feed(self, data: bytes) -> bytes:
        """The bytes that may pass of those, now."""


class AsItIs:
    """Everything passes, up to an error."""

    is_done = True

    def __init__(self) -> None:
        self.has_failed = False

    def in_frames(self, data: bytes) -> bytes | None:
        return data if are_whole_frames(data) and ERROR_EVENT not in data else None

    def feed(self, data: bytes) -> bytes:
        if self.has_failed:
            return b""
        passed, error, _ = data.partition(ERROR_EVENT)
        self.has_failed = bool(error)
        return passed
