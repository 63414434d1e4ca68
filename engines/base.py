"""The words every other module uses."""

import itertools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from .openai.request import Asked
    from .openai.routes import Route

JSONObject: TypeAlias = dict[str, Any]
"""A parsed JSON object. Its values are the client's: passed on unchanged, never re-modelled."""


class Role(StrEnum):
    """What a node does in an exchange."""

    PREFILL = "prefill"
    DECODE = "decode"


class NodeRole(StrEnum):
    """What a node is there for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    """Prefill in one exchange and decode in another, never both in one hand-off."""

    def does(self, role: Role) -> bool:
        return self in ("both", role)


@dataclass(frozen=True, slots=True)
class Parallel:
    """How many devices of a node do what: each of its `data` engines is `tensor` * `pipeline` workers."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def workers(self) -> int:
        """A device each."""
        return self.tensor * self.pipeline * self.data

    def flags(self) -> dict[str, int]:
        """vLLM's, of the sizes that are not 1."""
        sizes = {
            "--tensor-parallel-size": self.tensor,
            "--pipeline-parallel-size": self.pipeline,
            "--data-parallel-size": self.data,
        }
        return {flag: size for flag, size in sizes.items() if size > 1}


@dataclass(frozen=True, slots=True)
class Rank:
    """One hand-off target of a prefill node: one data-parallel rank of its present life."""

    number: int
    engine_id: str
    of: int = 1
    """How many ranks the node has."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a node says of itself: load now, and tokens since its start."""

    running: float = 0
    waiting: float = 0
    kv_usage: float = 0
    """Share of the KV cache's blocks in use or held for a hand-off, 0 to 1."""
    transferred: float = 0
    """Prompt tokens whose KV came from a prefill node."""
    computed: float = 0
    """Prompt tokens the node computed itself."""
    cached: float = 0
    """Prompt tokens it found in its own prefix cache."""
    generated: float = 0

    @property
    def prompt_tokens(self) -> float:
        """All that it has counted, wherever their KV came from."""
        return self.transferred + self.computed + self.cached


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a probe of a node found."""

    models: tuple[JSONObject, ...]
    """Its model cards, as its list of models gives them."""
    gauges: Gauges
    version: str
    """The engine's own; empty when it does not say."""
    layout: Mapping[str, str] = field(default_factory=dict)
    """What must be equal on nodes between which KV moves: the block size, the cache's type …"""
    cache_tokens: int | None = None
    """How many tokens of prompts it can keep for the next ones; 0 without a prefix cache, None when not said."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What the prefill leg's answer says about the prompt."""

    answer: JSONObject
    prompt_tokens: int
    cached_tokens: int | None = None
    """Tokens the prefill node took from its own prefix cache; None when it does not say."""
    token_ids: bytes | None = None
    """The prompt's token ids as the node wrote them, a JSON array; never parsed, only passed on."""


class PrefillRefusedError(ValueError):
    """The prefill node answered 200 but holds no KV for a decode leg; the message says why."""


class HandOff(Protocol):
    """What both legs of *one* attempt of *one* sequence are told so that the KV finds its way. Single use."""

    @property
    def pins_kv(self) -> bool:
        """The prefill node keeps the KV until it is fetched, so one that is not used must be released."""

    def prefill_params(self) -> JSONObject | None:
        """`kv_transfer_params` of the prefill leg."""

    def decode_params(self, answer: JSONObject) -> JSONObject | None:
        """`kv_transfer_params` of the decode leg, given the prefill node's answer. Raises PrefillRefusedError."""


class Connector(Protocol):
    """A KV connector, seen from the proxy."""

    moves_kv: bool
    """Prefill nodes hand prompts over to decode nodes; without it each node computes its own."""

    has_bootstrap: bool
    """Prefill nodes have a bootstrap server, where the identity of their present life is found."""

    is_best_effort: bool
    """A decode node may find only part of a prompt's KV, or none, without anything being wrong."""

    needs_store: bool
    """Nodes share a store, which is started before them."""

    transfer_engines: int
    """How many Mooncake transfer engines each worker of a node has."""

    def hand_off(self, bootstrap: str | None, rank: Rank | None) -> HandOff: ...


class Engine(Protocol):
    """A serving engine, seen from the proxy: the bodies of its legs, and what its answers mean.

    What depends on the engine's version is asked with the version that the node gave (`NodeFacts.version`).
    """

    name: str
    health_path: str
    models_path: str
    metrics_path: str
    version_path: str

    def facts(self, models: bytes, metrics_text: bytes, version: bytes) -> NodeFacts:
        """What a probe found, from the answers of these paths. Raises ValueError when they are no such answers."""

    def prefill_leg(
        self, route: "Route", asked: "Asked", transfer_params: JSONObject | None, *, judges_all: bool = False
    ) -> JSONObject:
        """The request that makes a prefill node compute a prompt's KV and hold it.

        `judges_all`: with every field that it can have, so that it refuses what the decode node would.
        """

    def prefilled(self, route: "Route", raw: bytes) -> Prefilled:
        """What the prefill node's 200 answer promises. Raises PrefillRefusedError when it holds no KV."""

    def decode_leg(
        self, route: "Route", asked: "Asked", transfer_params: JSONObject | None, prefilled: Prefilled, *, stream: bool
    ) -> JSONObject:
        """The client's request with the KV to start from; as a stream even if the client wants none."""

    def tell_tokens(self, leg: JSONObject) -> None:
        """Have a decode leg's stream tell its tokens, for a continuation."""

    def release_leg(self, model: object, transfer_params: JSONObject) -> JSONObject:
        """A request that a decode node refuses, and by that frees the KV on the prefill node."""

    def is_freed_by_refusal(self, status: int, error_kind: str) -> bool:
        """Whether an error answer of a decode leg means that its hand-off has been freed."""

    def survives_refusals(self, version: str) -> bool:
        """Whether a decode node of this version lives on after it refused a request that carries a hand-off, or dropped
        one whose client left before it was scheduled.
        """

    def may_refuse(self, asked: "Asked", prompt_tokens: int, max_model_len: int | None) -> bool:
        """Whether a decode node may refuse what a prefill node has taken with `judges_all`. Errs on this side."""

    def version_problem(self, version: str) -> str:
        """Why this version is not to be used; empty when it is."""

    def version_family(self, version: str) -> str:
        """What must be equal on nodes between which KV moves."""


_PROCESS = secrets.token_hex(10)
_NUMBERS = itertools.count(1)


def new_id() -> str:
    """32 hexadecimal digits, used by nobody else: this process's own random ones, and a number."""
    return f"{_PROCESS}{next(_NUMBERS):012x}"


def foreign_owners(distributions: Mapping[str, list[str]]) -> dict[str, str]:
    """Which of our import packages another installed distribution also claims.

    The names `proxy`, `launcher` and `engines` are generic; with two owners Python imports whichever was installed
    last. `distributions` is `importlib.metadata.packages_distributions()`; returns {package: other distribution}.
    """
    ours = ("engines", "launcher", "proxy")
    return {package: owner for package in ours for owner in distributions.get(package, []) if owner != "pd-launch"}
