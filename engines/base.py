"""The words every other module uses."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeAlias

JSONObject: TypeAlias = dict[str, Any]
"""A parsed JSON object. Its values are the client's: passed on unchanged, never re-modelled."""


class Role(StrEnum):
    """What a node does in an exchange."""

    PREFILL = "prefill"
    DECODE = "decode"


def foreign_owners(distributions: Mapping[str, list[str]]) -> dict[str, str]:
    """Which of our import packages another installed distribution also claims.

    The names `proxy`, `launcher` and `engines` are generic; with two owners Python imports whichever was installed
    last. `distributions` is `importlib.metadata.packages_distributions()`; returns {package: other distribution}.
    """
    ours = ("engines", "launcher", "proxy")
    return {package: owner for package in ours for owner in distributions.get(package, []) if owner != "pd-launch"}
