"""The words every other module uses."""

import itertools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

JSONObject: TypeAlias = dict[str, Any]
"""A parsed JSON object. Its values are the client's: passed on unchanged, never re-modelled."""


class Role(StrEnum):
    """What a node does in an exchange."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Rank:
    """One hand-off target of a prefill node: one data-parallel rank of its present life."""

    number: int
    engine_id: str
    of: int = 1
    """How many ranks the node has."""


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

    has_bootstrap: bool
    """Prefill nodes have a bootstrap server, where the identity of their present life is found."""

    is_best_effort: bool
    """A decode node may find only part of a prompt's KV, or none, without anything being wrong."""

    def hand_off(self, bootstrap: str | None, rank: Rank | None) -> HandOff: ...


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
