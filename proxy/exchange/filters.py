"""What a stream's bytes go through between its node and its client."""

from typing import Protocol

from engines.openai.sse import EventRules, Splitter

from ..upstream.framing import are_whole_events


class StreamFilter(Protocol):
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


class PassEvents:
    """Every event passes, whole, up to an error; the stream is done with the event that its route ends with."""

    __slots__ = ("_holds_rest", "_rules", "_splitter", "has_failed", "is_done")

    def __init__(self, rules: EventRules) -> None:
        self._rules = rules
        self._splitter = Splitter()
        self._holds_rest = False
        self.has_failed = False
        self.is_done = False

    def in_frames(self, data: bytes) -> bytes | None:
        rules = self._rules
        if self._holds_rest or rules.error_hint in data or rules.end_hint in data or not are_whole_events(data):
            return None
        return data

    def feed(self, data: bytes) -> bytes:
        """Raises ValueError when an event never ends."""
        if self.has_failed:
            return b""
        whole = self._splitter.feed(data)
        self._holds_rest = not self._splitter.is_between_events
        if self._rules.error_in(whole) is not None:
            whole, self.has_failed = self._rules.before_error(whole), True
        self.is_done = self.is_done or self._rules.has_end(whole)
        return whole


class PassBytes:
    """For an answer that is no stream of events: its length, or its connection's end, says when it is whole."""

    has_failed = False
    is_done = True

    def in_frames(self, data: bytes) -> bytes | None:
        del data
        return None

    def feed(self, data: bytes) -> bytes:
        return data
