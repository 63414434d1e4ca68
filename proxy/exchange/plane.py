"""What every exchange shares, and what a client looks like to one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engines.base import Role
from engines.openai.request import Asked

from ..metrics import Metrics
from ..nodes.clients import NodeClients
from ..nodes.fleet import Fleet
from ..nodes.node import Node
from ..routing.decode import DecodeRouter
from ..routing.prefill import PrefillRouter
from ..routing.prompts import Prompt
from ..routing.split import Split
from ..settings import ProxySettings
from ..upstream.client import Answer, Headers
from .filters import StreamFilter
from .memory import Reservation

if TYPE_CHECKING:
    from .release import Releaser
    from .retry import RetryBudget
    from .stored import StoredResponses


@dataclass(frozen=True, slots=True)
class DataPlane:
    """What every exchange shares."""

    settings: ProxySettings
    fleet: Fleet
    clients: NodeClients
    metrics: Metrics
    releaser: "Releaser"
    budget: "RetryBudget"
    stored: "StoredResponses"
    prefills: PrefillRouter
    decodes: DecodeRouter
    split: Split


@dataclass(slots=True)
class SamePrompt:
    """What several requests with one prompt share: where it is computed, so that it is computed once."""

    node: Node | None = None
    rank: int | None = None
    prompt: Prompt | None = None


@dataclass(frozen=True, slots=True)
class Only:
    """The nodes that must answer, for whoever is bound to them; None: any."""

    prefill: Node | None = None
    decode: Node | None = None

    def of(self, role: Role) -> Node | None:
        return self.prefill if role is Role.PREFILL else self.decode


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request, read and parsed."""

    path: str
    asked: Asked
    id: str
    headers: Headers
    """Those of the client's headers that the nodes get, the request id among them."""
    memory: Reservation | None = None
    """What its prompt is counted in."""
    same_prompt: SamePrompt | None = None

    def forget_prompt(self) -> None:
        """The answer has begun: let go of what only its beginning needed."""
        self.asked.forget_prompt()
        if self.memory is not None:
            self.memory.release()


class Client(Protocol):
    """Where the answer goes."""

    @property
    def started(self) -> bool:
        """It has got the beginning of an answer."""

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer."""

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]], first: bytes) -> None:
        """The head of an answer whose length nobody knows yet, and its first bytes."""

    async def relay(self, answer: Answer, through: StreamFilter, *, silence_s: float, stall_s: float) -> None:
        """The rest of a node's answer. Raises NodeError, or ClientStalledError."""

    def write(self, chunk: bytes) -> None:
        """A piece of an answer that has begun."""

    async def drained(self, stall_s: float) -> None:
        """Until it can take more. Raises ClientStalledError."""

    def finish(self) -> None:
        """The end of an answer that `write` has written."""
