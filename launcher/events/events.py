"""Everything a launcher tells, as one stream of events with times. No sink of it can end what it tells of."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

_NEWS_EVERY_S = 15.0
_DETAIL_WIDTH = 120

Kind = Literal["begun", "news", "done", "failed", "stopped", "note", "warning", "error", "text", "ready"]
"""The first five are of steps: a piece of work that takes a while. A text is a note without a time of its own."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    at: float
    """Seconds since 1970."""
    kind: Kind
    text: str
    node: str = ""
    seconds: float | None = None
    """How long a step took, or has taken so far."""
    data: dict[str, Any] = field(default_factory=dict)
    """For programs."""

    def in_words(self) -> str:
        """As a person reads it, without its time."""
        took = "" if self.seconds is None else f"  {self.seconds:.0f} s"
        match self.kind:
            case "begun":
                return f"  {self.text} ..."
            case "news":
                return f"  {self.text}"
            case "done":
                return f"✓ {self.text}{took}"
            case "failed":
                return f"✗ {self.text}{took}"
            case "stopped":
                return f"- {self.text}{took}"
            case _:
                return self.text

    @property
    def of_a_step(self) -> bool:
        return self.kind in ("begun", "news", "done", "failed", "stopped")


Sink = Callable[[Event], None]
Say = Callable[[str], None]


@dataclass(eq=False, slots=True)
class Step:
    """A piece of work that runs."""

    name: str
    detail: Callable[[], str]
    node: str
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.began


Live = Callable[[Sequence[Step]], AbstractAsyncContextManager[None]]
"""What shows running steps for as long as it lasts."""


class Events:
    """One launcher's stream. Several threads of work may tell at once."""

    def __init__(self, *sinks: Sink, live: Live | None = None) -> None:
        self._sinks = list(sinks)
        self.live: Live = live or (lambda _: nullcontext())
        self.running: list[Step] = []

    def tell(self, event: Event) -> None:
        for sink in tuple(self._sinks):
            with suppress(Exception):  # a closed terminal, a full disk: that ends nothing
                sink(event)

    def say(self, text: str, kind: Kind = "note", node: str = "", **data: Any) -> None:
        """A line, or several, as they are."""
        self.tell(Event(time.time(), kind, text, node, data=data))  # noqa: TID251  for people, and beside nodes' logs

    @contextmanager
    def step(self, name: str, detail: Callable[[], str] = lambda: "", node: str = "") -> Iterator[None]:
        """A piece of work that takes a while. `detail` gives its last news, one line."""
        step = Step(name, detail, node)
        self.running.append(step)
        self._tell_of(step, "begun")
        kind: Kind = "failed"
        try:
            yield
            kind = "done"
        except (asyncio.CancelledError, KeyboardInterrupt):
            kind = "stopped"  # by what happened to another, or by whoever asked for it
            raise
        finally:
            self.running.remove(step)
            self._tell_of(step, kind)

    def add(self, sink: Sink) -> None:
        self._sinks.append(sink)

    @contextmanager
    def also(self, sink: Sink) -> Iterator[None]:
        """Whoever has asked for something hears what comes of it."""
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Show the running steps for as long as this lasts."""
        news = asyncio.create_task(self._tell_news())
        try:
            async with self.live(self.running):
                yield
        finally:
            news.cancel()
            with suppress(asyncio.CancelledError):
                await news

    async def _tell_news(self) -> None:
        while True:
            await asyncio.sleep(_NEWS_EVERY_S)
            for step in tuple(self.running):
                text = f"{step.name}  {step.seconds():.0f} s  {step.detail()[:_DETAIL_WIDTH]}".rstrip()
                self.tell(Event(time.time(), "news", text, step.node, step.seconds()))  # noqa: TID251  as above

    def _tell_of(self, step: Step, kind: Kind) -> None:
        seconds = None if kind == "begun" else step.seconds()
        self.tell(Event(time.time(), kind, step.name, step.node, seconds))  # noqa: TID251  as above
