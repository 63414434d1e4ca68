"""Server-sent events: the one reader of them. Lines end by LF or CRLF; comments (keep-alives) are events without data.

Every route has its own signs of an error and of the stream's end (`EventRules`). Source: the WHATWG HTML standard,
section 9.2, and vLLM 0.32 (entrypoints/anthropic/serving.py, entrypoints/openai/responses/api_router.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

END_OF_EVENT = b"\n\n"
MOST_EVENT_BYTES = 64 * 2**20
"""An event longer than this is no event: whoever sends it sends no stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its `event:` name, empty when it has none, and its data."""

    name: bytes
    data: bytes


class Splitter:
    """Cuts a stream into whole events, however its bytes are split, and makes every line end by LF."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._has_cr = False
        """The last byte was a CR, whose LF may come next."""

    def feed(self, data: bytes) -> bytes:
        """All events that are complete now; what comes of an event before its end is held until it is whole.

        Raises ValueError when an event never ends.
        """
        if self._has_cr or b"\r" in data:
            data = self._with_lf(data)
        if self._held:
            if END_OF_EVENT not in data and not (self._held[-1].endswith(b"\n") and data.startswith(b"\n")):
                self._hold(data)
                return b""
            data = b"".join((*self._held, data))
            self._held.clear()
            self._held_bytes = 0
        found = data.rfind(END_OF_EVENT)
        if found < 0:
            self._hold(data)
            return b""
        end = found + len(END_OF_EVENT)
        if end == len(data):
            return data
        self._hold(data[end:])
        return data[:end]

    @property
    def is_between_events(self) -> bool:
        """Nothing is held."""
        return not self._held and not self._has_cr

    def _hold(self, data: bytes) -> None:
        if data:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > MOST_EVENT_BYTES:
                raise ValueError(f"an event of more than {MOST_EVENT_BYTES} bytes")

    def _with_lf(self, data: bytes) -> bytes:
        if self._has_cr:
            data = b"\r" + data
        self._has_cr = data.endswith(b"\r")
        return data[: len(data) - self._has_cr].replace(b"\r\n", b"\n")


def events(whole: bytes) -> Iterator[Event]:
    """The events with data among whole ones, as `Splitter` gives them."""
    for block in whole.split(END_OF_EVENT):
        name, data = b"", []
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif field == b"event":
                name = value.removeprefix(b" ")
        if data:
            yield Event(name, b"\n".join(data))


@dataclass(frozen=True, slots=True)
class EventRules:
    """How a route's stream says that it failed, and that it is complete.

    `error_hint` and `end_hint` are bytes that every such event has, looked for in bulk before an event is parsed.
    """

    error_names: frozenset[bytes]
    error_starts: tuple[bytes, ...]
    end_names: frozenset[bytes]
    ends: tuple[bytes, ...]
    error_hint: bytes
    end_hint: bytes
    opening_names: frozenset[bytes] = frozenset()
    """Of events that a server sends before its engine has got the request, and may refuse it."""

    def has_begun(self, whole: bytes) -> bool:
        """Whether an event of the engine's own is among these."""
        return any(event.name not in self.opening_names for event in events(whole))

    def error_in(self, whole: bytes) -> bytes | None:
        """The data of the first error event among these; None when there is none."""
        if self.error_hint not in whole:
            return None
        return next((event.data for event in events(whole) if self._is_error(event)), None)

    def has_end(self, whole: bytes) -> bool:
        """Whether the event that completes the stream is among these."""
        return self.end_hint in whole and any(self._is_end(event) for event in events(whole))

    def before_error(self, whole: bytes) -> bytes:
        """The events before the first error."""
        passed = []
        for block in whole.split(END_OF_EVENT):
            if any(self._is_error(event) for event in events(block)):
                break
            passed.append(block)
        return END_OF_EVENT.join(passed) + END_OF_EVENT if any(passed) else b""

    def _is_error(self, event: Event) -> bool:
        if event.name:
            return event.name in self.error_names
        return event.data.startswith(self.error_starts)

    def _is_end(self, event: Event) -> bool:
        return event.name in self.end_names or event.data in self.ends


OPENAI_EVENTS = EventRules(
    error_names=frozenset(),
    error_starts=(b'{"error"',),
    end_names=frozenset(),
    ends=(b"[DONE]",),
    error_hint=b'{"error"',
    end_hint=b"[DONE]",
)
"""Completions and chat: an error is an event of its own, the end is `[DONE]`."""

MESSAGES_EVENTS = EventRules(
    error_names=frozenset({b"error"}),
    error_starts=(b'{"type":"error"', b'{"error"'),
    end_names=frozenset({b"message_stop"}),
    ends=(),
    error_hint=b"error",
    end_hint=b"message_stop",
)
RESPONSES_EVENTS = EventRules(
    error_names=frozenset({b"error", b"response.failed"}),
    error_starts=(b'{"type":"error"', b'{"error"'),
    end_names=frozenset({b"response.completed", b"response.incomplete"}),
    ends=(),
    error_hint=b"event:",
    end_hint=b"response.",
    opening_names=frozenset({b"response.created", b"response.in_progress", b"response.queued"}),
)
