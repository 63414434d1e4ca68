"""How many of each? Every division of the devices, in a model of a pair that was measured.

The model is `proxy.simulation`: the proxy's own choice of nodes, in virtual time, as a program of its own.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.performance import Constants

from ..errors import ConfigError, LauncherError
from . import stages
from .arms import Arm
from .calibrate import Measured
from .loadgen import Row
from .results import Figures, figures
from .slo import Slo
from .workload import Workload

MORE_TRAFFIC = 1.2
_WORSE = 0.99
"""Of goodput in percent, below which something has broken."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an arm would do."""

    arm: Arm
    figures: Figures
    spent: dict[str, float]
    """Seconds of a request in the mean, by stage."""
    busy: dict[str, float]
    """The share of the time that nodes of each kind have work."""

    @property
    def share(self) -> float:
        """Of the requests, that are good."""
        return self.figures.good / max(self.figures.requests, 1)

    def binding(self, slo: Slo) -> stages.Binding:
        return stages.binding(self.spent, self.figures, slo)


@dataclass(frozen=True, slots=True)
class Sized:
    """All arms, the best first, and what breaks the best one with more traffic."""

    outcomes: list[Outcome]
    stressed: Outcome | None
    """The best one with more traffic; None when it keeps its share of good answers."""
    next_node: str
    """What to add then: a prefill node, a decode node, an ordinary node."""


def divisions(nodes: int) -> list[Arm]:
    """Every way to use so many."""
    pairs = [Arm(prefill=prefill, decode=nodes - prefill) for prefill in range(1, nodes)]
    return [*pairs, Arm(ordinary=nodes)]


async def size(constants: Constants, workload: Workload, slo: Slo, nodes: int) -> Sized:
    """Raises LauncherError."""
    found = await predict(constants, workload, slo, divisions(nodes))
    found.sort(key=lambda one: (-one.figures.goodput, sum(one.spent.values())))
    best = found[0]
    more = workload.stretched(1 / MORE_TRAFFIC)
    stressed, *larger = await predict(constants, more, slo, [best.arm, *_neighbours(best.arm)])
    if stressed.share >= _WORSE * best.share:
        return Sized(found, None, "")
    helping = max(larger, key=lambda one: one.share)
    return Sized(found, stressed, _added(best.arm, helping.arm))


def _neighbours(arm: Arm) -> list[Arm]:
    """With one node more."""
    if arm.ordinary:
        return [Arm(ordinary=arm.ordinary + 1)]
    return [replace(arm, prefill=arm.prefill + 1), replace(arm, decode=arm.decode + 1)]


def _added(arm: Arm, larger: Arm) -> str:
    kinds = {"prefill": "a prefill node", "decode": "a decode node", "ordinary": "an ordinary node"}
    return next(text for kind, text in kinds.items() if getattr(larger, kind) > getattr(arm, kind))


async def predict(constants: Constants, workload: Workload, slo: Slo, arms: Sequence[Arm]) -> list[Outcome]:
    """Shared out to the cores of this machine. Raises LauncherError."""
    workers = min(os.cpu_count() or 1, len(arms))
    parts = [list(arms[first::workers]) for first in range(workers)]
    answers = await asyncio.gather(*(_asked(constants, workload, part) for part in parts))
    found = {
        arm: Outcome(arm, _figures(workload, slo, told, arm), told["stages"], told["busy"])
        for part, answer in zip(parts, answers, strict=True)
        for arm, told in zip(part, answer, strict=True)
    }
    return [found[arm] for arm in arms]


async def _asked(constants: Constants, workload: Workload, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    question = {
        "constants": constants.model_dump(),
        "piece_tokens": workload.piece_tokens,
        "shapes": [{"prefill": arm.prefill, "decode": arm.decode, "ordinary": arm.ordinary} for arm in arms],
        "requests": [[one.at, one.tokens, one.output, one.pieces] for one in workload.requests],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "proxy.simulation",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C on a terminal is for the launcher, which ends it
    )  # fmt: skip
    try:
        out, err = await process.communicate(orjson.dumps(question))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = (err.decode("utf-8", "replace").strip().splitlines() or ["no word of why"])[-1]
        raise LauncherError(f"the simulation ended with {process.returncode}: {last}")
    answer: list[dict[str, Any]] = orjson.loads(out)
    return answer


def _figures(workload: Workload, slo: Slo, told: dict[str, Any], arm: Arm) -> Figures:
    path = "disaggregated" if arm.moves_kv else "aggregated"
    rows = [
        Row(number, due, due, first, ended, ended, request.tokens, request.output, path)
        for number, (request, (due, first, ended)) in enumerate(zip(workload.requests, told["rows"], strict=True))
    ]
    return figures(rows, slo)


# -- constants in a file


class _File(BaseModel):
    """What `size` wrote, or somebody by hand: the constants alone suffice."""

    model_config = ConfigDict(extra="forbid")

    constants: Constants
    prefill: list[tuple[int, float]] = Field(default_factory=list)
    decode: list[tuple[int, int, float]] = Field(default_factory=list)
    hand_off: list[tuple[int, float]] = Field(default_factory=list)


def read(file: Path) -> Measured:
    """Raises ConfigError."""
    try:
        found = _File.model_validate_json(file.read_text())
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
    except ValidationError as exc:
        problem = exc.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{file}: {place}: {problem['msg']}", _LIKE) from exc
    return Measured(found.constants, found.prefill, found.decode, found.hand_off)


_LIKE = (
    'Like {"constants": {"prefill": [0.02, 5e-5, 0], "decode": [0.012, 1e-4, 2e-8], "hand_off": [0.01, 1e-6], '
    '"kv_tokens": 400000}}: see launcher/README.md'
)


# -- how far it can be trusted


@dataclass(frozen=True, slots=True)
class Checked:
    """A prediction beside what `compare` has measured."""

    folder: Path
    arm: str
    predicted: float
    measured: float
    """Goodput, requests a second."""


async def checked_against(folders: Sequence[Path], constants: Constants, model: str, read_trace: Any) -> list[Checked]:
    """Every comparison of this model among the folders, predicted again. What cannot be read is left out."""
    found = list[Checked]()
    for folder in folders:
        try:
            report = json.loads((folder / "report.json").read_text())
            workload: Workload = read_trace(folder / "trace.jsonl", report["held"]["workload"]["piece_tokens"])
            slo = Slo(**report["held"]["slo"])
            arms = [Arm.parse(name.removesuffix(" ordinary")) for name, arm in report["arms"].items() if arm["counts"]]
        except (OSError, ValueError, KeyError, TypeError, LauncherError):
            continue
        if report["held"].get("model") != model:
            continue
        arms = [arm for arm in arms if not arm.both]
        for outcome in await predict(constants, workload, slo, arms):
            rounds = report["arms"][str(outcome.arm)]["rounds"]
            measured = median(one["figures"]["goodput"] for one in rounds)
            found.append(Checked(folder, str(outcome.arm), outcome.figures.goodput, measured))
    return found


def as_data(sized: Sized, measured: Measured, slo: Slo, checked: Sequence[Checked]) -> dict[str, Any]:
    """Everything that is said."""
    return {
        "slo": asdict(slo),
        "measured": measured.as_data(),
        "errors": measured.errors(),
        "arms": [
            {
                "arm": str(one.arm), "figures": asdict(one.figures) | {"goodput": one.figures.goodput},
                "stages": one.spent, "busy": one.busy, "binding": one.binding(slo),
            }
            for one in sized.outcomes
        ],
        "with_more_traffic": {
            "binds": sized.stressed.binding(slo) if sized.stressed else None,
            "add": sized.next_node,
        },
        "checked": [asdict(one) | {"folder": str(one.folder)} for one in checked],
    }  # fmt: skip
