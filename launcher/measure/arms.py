"""What is compared: nodes of one kind or another, on the same devices. `2P1D`, `3` (ordinary nodes), `2B`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..plan.config import LaunchConfig

_PAIRS = re.compile(r"(?i)(?P<prefill>[1-9]\d*)P(?P<decode>[1-9]\d*)D")
_ALIKE = re.compile(r"(?i)(?P<number>[1-9]\d*)(?P<kind>B?)")


@dataclass(frozen=True, slots=True)
class Arm:
    """Numbers of nodes."""

    prefill: int = 0
    decode: int = 0
    both: int = 0
    ordinary: int = 0
    """Without a KV connector: each computes the prompts it answers."""

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Raises ConfigError."""
        if pairs := _PAIRS.fullmatch(text.strip()):
            return cls(prefill=int(pairs["prefill"]), decode=int(pairs["decode"]))
        if alike := _ALIKE.fullmatch(text.strip()):
            number = int(alike["number"])
            return cls(both=number) if alike["kind"] else cls(ordinary=number)
        raise ConfigError(
            f"--arms: {text!r} is no arm",
            "2P1D: two prefill nodes and a decode node; 3: three ordinary nodes; 3B: three that do both",
        )

    @property
    def nodes(self) -> int:
        return self.prefill + self.decode + self.both + self.ordinary

    @property
    def moves_kv(self) -> bool:
        return not self.ordinary

    def __str__(self) -> str:
        if self.ordinary:
            return f"{self.ordinary} ordinary"
        return f"{self.both}B" if self.both else f"{self.prefill}P{self.decode}D"

    @property
    def label(self) -> str:
        """As it was given, for a folder."""
        return str(self).removesuffix(" ordinary")

    def config(self, base: LaunchConfig, **further: Any) -> LaunchConfig:
        """The run that is started for it. Raises ConfigError, when the base cannot be one."""
        numbers = {"prefill": self.prefill, "decode": self.decode or self.ordinary, "both": self.both}
        connector = {"connector": "none"} if self.ordinary else {}
        given = {name: getattr(base, name) for name in base.model_fields_set}
        try:
            return LaunchConfig.model_validate(given | numbers | connector | further)
        except ValidationError as exc:
            raise ConfigError(f"--arms {self}: {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc


def arms(text: str) -> list[Arm]:
    """Raises ConfigError: fewer than two, one twice, or different numbers of nodes."""
    found = [Arm.parse(part) for part in text.split(",") if part.strip()]
    if len(found) < 2 or len(set(found)) < len(found):
        raise ConfigError(f"--arms {text}: give two arms or more, each once", "Like --arms 1P1D,2")
    fair(found)
    return found


def fair(found: Sequence[Arm]) -> None:
    """Raises ConfigError when they do not have the same number of nodes: one device more is no better design."""
    numbers = {arm.nodes for arm in found}
    if len(numbers) > 1:
        told = ", ".join(f"{arm} has {arm.nodes}" for arm in found)
        raise ConfigError(f"--arms: different numbers of nodes: {told}", "Compare what the same devices can do")
