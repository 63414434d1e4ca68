"""How versions of vLLM differ, and with which of them this works: tried on real engines by `make test-versions`."""

from functools import lru_cache
from typing import Any

from packaging.version import InvalidVersion, Version

from ..base import JSONObject

OLDEST = Version("0.28")
NEWEST = Version("0.32")
"""Its patch versions, too."""

_SURVIVES_REFUSALS = Version("0.32")
"""Before, a refused request that carries a hand-off ends the decode node's engine (`assert req_id in self.requests`,
v1/core/sched/scheduler.py; seen on live pairs of 0.29, 0.30 and 0.31). So does one that is aborted in the queue."""


@lru_cache(maxsize=64)
def parsed(version: str) -> Version | None:
    """None for a build of one's own, which no number orders."""
    try:
        return Version(version)
    except InvalidVersion:
        return None


def survives_refusals(version: str) -> bool:
    found = parsed(version)
    return found is None or found >= _SURVIVES_REFUSALS


def problem(version: str) -> str:
    """Why it is not to be used; empty when it is, or when nobody knows."""
    found = parsed(version)
    if found is None:
        return ""
    if found.release < OLDEST.release:
        return f"vLLM {version} is older than {OLDEST}, the oldest that was tried"
    if found.release[:2] > NEWEST.release:
        return f"vLLM {version} is newer than {NEWEST}, the newest that was tried"
    return ""


def family(version: str) -> str:
    """What must be equal on both nodes of a pair: patch versions may differ, while nodes are upgraded."""
    found = parsed(version)
    return version if found is None else f"{found.major}.{found.minor}"


def may_refuse(body: JSONObject, prompt_tokens: int, max_model_len: int | None) -> bool:
    """Whether a decode node may refuse a request of which the prefill node has taken all but these numbers, which its
    own leg has others of. Errs on this side.
    """
    given = (body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    wanted = [value for value in given if value is not None]
    least = body.get("min_tokens")
    if max_model_len is None:
        return bool(wanted) or least is not None
    room = max_model_len - prompt_tokens
    if not all(_is_whole(value) and 1 <= value <= room for value in wanted):
        return True
    return least is not None and not (_is_whole(least) and 0 <= least <= min([*wanted, room]))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
