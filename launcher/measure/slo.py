"""What an answer must keep to be a good one: `ttft=2s,tpot=50ms`."""

import re
from dataclasses import dataclass

from ..errors import ConfigError

_LIMIT = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s)")
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}


@dataclass(frozen=True, slots=True)
class Slo:
    """All in seconds; None: as long as it likes."""

    ttft: float | None = None
    """From when the request was due to its first token."""
    tpot: float | None = None
    """The mean time between its tokens."""
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            found = _LIMIT.fullmatch(value.strip())
            if name not in _NAMES:
                raise ConfigError(f"--slo {text}: {name!r} is none of {', '.join(_NAMES)}", "Like ttft=2s,tpot=50ms")
            if found is None:
                raise ConfigError(f"--slo {text}: {part.strip()!r} has no number with a unit", "Like ttft=2s,tpot=50ms")
            limits[name] = float(found["number"]) / (1000 if found["unit"] == "ms" else 1)
            if not limits[name]:
                raise ConfigError(f"--slo {text}: nothing takes no time", "Like ttft=2s,tpot=50ms")
        return cls(**limits)

    def __str__(self) -> str:
        limits = {name: limit for name in _NAMES if (limit := getattr(self, name)) is not None}
        return ", ".join(f"{_NAMES[name]} ≤ {seconds(limit)}" for name, limit in limits.items())


def seconds(value: float) -> str:
    """For people."""
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
