"""All rounds of all arms, in turn: forwards, backwards, forwards, so that no arm has the better time of day.

An arm is started, proven and warmed up as `pd-launch up` would start it, and replays its rounds. Every round is written
down when it is over: what was interrupted goes on with the rounds that are missing.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx

from .. import private
from ..errors import ConfigError, InterruptedStart, LauncherError, NodeDiedError
from ..events.events import Events
from ..hosts.host import Host
from ..hosts.reserve import Reserved
from ..plan.config import LaunchConfig
from ..plan.plan import Plan
from ..run import proof
from ..run.supervisor import Supervisor
from . import load, stages
from .arms import Arm
from .loadgen import Row
from .slo import Slo
from .stages import Stages
from .starting import refuse_what_is_too_long, started, vocabulary_of
from .workload import Workload

MOST_TRIES = 2
"""Of a round in which a node died."""
FEWEST_REQUESTS = 200
"""For a verdict."""
ENOUGH_MOVED = 0.9
"""Of the prompt tokens that were handed over, which must have come by transfer."""
_HELD = "held.json"
_WARM_UP = 16
_WARM_UP_GAP_S = 0.2
_WARM_UP_DRAW = -1


@dataclass(frozen=True)
class Job:
    """What is to be found out."""

    base: LaunchConfig
    arms: tuple[Arm, ...]
    workload: Workload
    slo: Slo
    rounds: int
    folder: Path

    @property
    def order(self) -> list[tuple[Arm, int]]:
        """ABBAAB: (arm, number of its round)."""
        turns = (self.arms if number % 2 == 0 else self.arms[::-1] for number in range(self.rounds))
        return [(arm, number + 1) for number, turn in enumerate(turns) for arm in turn]


@dataclass(frozen=True, slots=True)
class Round:
    """One round that came to its end."""

    arm: Arm
    number: int
    rows: list[Row]
    stages: Stages

    @property
    def moved(self) -> float | None:
        """The share of prompt tokens handed over that came to a decode node; None of ordinary nodes."""
        handed = sum(row.prompt_tokens for row in self.rows if row.path == "disaggregated")
        if not self.arm.moves_kv:
            return None
        return min(self.stages.transferred / handed, 1.0) if handed else 0.0


@dataclass
class Found:
    """Everything that was found out."""

    rounds: list[Round] = field(default_factory=list)
    failed: dict[Arm, str] = field(default_factory=dict)
    """Arms without a result, and why."""
    held: dict[str, Any] = field(default_factory=dict)
    """What was the same for all."""

    def of(self, arm: Arm) -> list[Round]:
        return [one for one in self.rounds if one.arm == arm]

    def is_void(self, arm: Arm) -> bool:
        """Its KV did not move: what was measured is something else."""
        return any(one.moved is not None and one.moved < ENOUGH_MOVED for one in self.of(arm))

    def counts(self, arm: Arm) -> bool:
        """Whether it takes part in the verdict."""
        return bool(self.of(arm)) and arm not in self.failed and not self.is_void(arm)


class Comparison:
    """Carries out a job, once."""

    def __init__(self, job: Job, host: Host, events: Events) -> None:
        self._job = job
        self._host = host
        self._events = events
        self._tries: Counter[tuple[Arm, int]] = Counter()
        self._starts = 0
        self._kept = 0
        """Rounds that were played before this went on."""
        self._began = time.monotonic()
        self._found = Found()

    async def run(self) -> Found:
        """Raises LauncherError; what an arm fails of is in what was found."""
        self._found.rounds = [one for arm, number in self._job.order if (one := read(self._job, arm, number))]
        self._found.held = read_held(self._job)
        self._kept = len(self._found.rounds)
        while missing := self._missing():
            arm, numbers = missing
            await self._rounds_of(arm, numbers)
        return self._found

    def _missing(self) -> tuple[Arm, list[int]] | None:
        """The next rounds that one start of an arm can play."""
        done = {(one.arm, one.number) for one in self._found.rounds}
        left = [turn for turn in self._job.order if turn not in done and turn[0] not in self._found.failed]
        for arm, turns in groupby(left, key=lambda turn: turn[0]):
            return arm, [number for _, number in turns]
        return None

    async def _rounds_of(self, arm: Arm, numbers: list[int]) -> None:
        """One that cannot be started as it should be is out; a round in which a node died is tried again."""
        self._starts += 1
        done_before = len(self._found.rounds)
        try:
            await self._started(arm, numbers)
        except NodeDiedError as exc:
            failing = numbers[len(self._found.rounds) - done_before]
            self._tries[arm, failing] += 1
            if self._tries[arm, failing] < MOST_TRIES:
                self._events.say(f"{arm}: a node died in round {failing}; once more. {exc}", "warning")
                return
            self._fails(arm, exc)
        except load.TooSlowError:
            raise
        except LauncherError as exc:
            if isinstance(exc, ConfigError | InterruptedStart):
                raise
            self._fails(arm, exc)
        except httpx.HTTPError as exc:
            self._fails(arm, LauncherError(f"a node or the proxy could not be asked: {exc!r}"))

    def _fails(self, arm: Arm, exc: LauncherError) -> None:
        self._found.failed[arm] = f"{exc}{chr(10) + exc.hint if exc.hint else ''}"
        self._events.say(f"{arm} is out: {exc}\n{exc.hint}", "error")

    async def _started(self, arm: Arm, numbers: list[int]) -> None:
        path = self._job.folder / f"{arm.label}-start{self._starts}"

        async def play(running: Supervisor) -> None:
            await self._play(running, arm, numbers)

        def planned(reserved: Reserved) -> None:
            self._note_held(arm, reserved)

        await started(arm, self._job.base, path, self._host, self._events, play, planned)

    def _note_held(self, arm: Arm, reserved: Reserved) -> None:
        """Raises ConfigError when this arm has more devices than another."""
        plan, held = reserved.plan, self._found.held
        devices = len({device for node in plan.nodes for device in node.devices}) or len(plan.nodes)
        if held.setdefault("devices", devices) != devices:
            raise ConfigError(
                f"--arms: {arm} takes {devices} devices, another {held['devices']}",
                "Compare what the same devices can do",
            )
        held["device"] = plan.device
        held["model"] = plan.served_model_name
        held["engine"] = plan.engine
        held["versions"] = dict(reserved.facts.engine.versions)
        held["devices_named"] = sorted({device for node in plan.nodes for device in node.devices})
        private.write(self._job.folder / _HELD, json.dumps(held))

    # -- one start of an arm

    async def _play(self, running: Supervisor, arm: Arm, numbers: list[int]) -> None:
        await running.start()
        plan = running.plan
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            await refuse_what_is_too_long(client, plan, self._job.workload)
            vocabulary = await vocabulary_of(client, plan)
        async with self._events.shown():
            with self._events.step(f"{arm}: warm-up"):
                await running.while_all_live(self._warm_up(plan, vocabulary))
            for number in numbers:
                await self._round(running, arm, number, vocabulary)

    async def _warm_up(self, plan: Plan, vocabulary: list[int]) -> None:
        """Requests of the same kind, which count for nothing. Raises LauncherError when none is answered."""
        first = self._job.workload.first(_WARM_UP)
        gap = min(_WARM_UP_GAP_S, 1 / self._job.workload.rate)
        paced = replace(
            first, requests=tuple(replace(one, at=number * gap) for number, one in enumerate(first.requests))
        )
        rows = await self._send(plan, paced, vocabulary, _WARM_UP_DRAW)
        if all(row.problem for row in rows):
            raise LauncherError(f"no request of the warm-up was answered: {rows[0].problem}", f"Logs: {plan.run_dir}")

    async def _round(self, running: Supervisor, arm: Arm, number: int, vocabulary: list[int]) -> None:
        answered, total = Counter[str](), len(self._job.workload.requests)
        name = f"{arm}: round {number} of {self._job.rounds}"

        async def play() -> None:
            plan = running.plan
            sending = self._send(plan, self._job.workload, vocabulary, number, lambda _: answered.update(["answered"]))
            rows, before, after, looks = await stages.watched(plan, sending)
            one = Round(arm, number, rows, stages.stages(plan, rows, before, after, looks))
            write(self._job, one)
            self._found.rounds.append(one)

        with self._events.step(name, lambda: f"{answered['answered']} of {total} answered; {self._left()}"):
            await running.while_all_live(play())

    def _left(self) -> str:
        """How long it still takes, by how long it took so far."""
        done, total = len(self._found.rounds), len(self._job.order)
        played, spent = done - self._kept, time.monotonic() - self._began
        left = f", about {spent / played * (total - done) / 60:.0f} min left" if played else ""
        return f"round {done + 1} of {total} in all{left}"

    async def _send(
        self,
        plan: Plan,
        workload: Workload,
        vocabulary: list[int],
        draw: int,
        told: Callable[[Row], object] = lambda _: None,
    ) -> list[Row]:
        plan_of_requests = load.planned(workload, plan.served_model_name, vocabulary, draw)
        return await load.run(plan.proxy_url, proof.key(plan), plan_of_requests, told)


# -- what is written down


def _file(job: Job, arm: Arm, number: int) -> Path:
    return job.folder / "rounds" / f"{arm.label}-{number}.jsonl"


def write(job: Job, one: Round) -> None:
    """A head, and a line for each request."""
    file = _file(job, one.arm, one.number)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    head = {"arm": str(one.arm), "round": one.number, "moved": one.moved, "stages": asdict(one.stages)}
    private.write(file, "".join(json.dumps(line) + "\n" for line in (head, *map(asdict, one.rows))))


def read(job: Job, arm: Arm, number: int) -> Round | None:
    """None when it was not played, or not to its end."""
    try:
        head, *rows = map(json.loads, _file(job, arm, number).read_text().splitlines())
        return Round(arm, number, [Row(**row) for row in rows], Stages(**head["stages"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_held(job: Job) -> dict[str, Any]:
    """What was the same for all so far."""
    with suppress(OSError, ValueError):
        held: dict[str, Any] = json.loads((job.folder / _HELD).read_text())
        return held
    return {}


def note(job: Job) -> dict[str, Any]:
    """What a comparison that goes on must have in common with its beginning."""
    return {
        "arms": [str(arm) for arm in job.arms], "slo": str(job.slo), "digest": job.workload.digest,
        "config": job.base.model_dump(mode="json", exclude={"run_dir"}, exclude_defaults=True),
    }  # fmt: skip


def begin(job: Job, *, resume: bool) -> None:
    """Make the folder, or see that it is this comparison's. Raises ConfigError."""
    file = job.folder / "compare.json"
    if resume:
        _refuse_another(job, file)
        return
    if file.exists():
        raise ConfigError(f"{job.folder} holds a comparison already", f"--resume {job.folder} goes on with it")
    job.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    private.write(file, json.dumps(note(job), indent=1))
    private.write(job.folder / "trace.jsonl", "\n".join(job.workload.lines()) + "\n")


def _refuse_another(job: Job, file: Path) -> None:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{job.folder} holds no comparison: {exc}") from exc
    now = note(job)
    differs = [name for name in now if before.get(name) != now[name]]
    if differs:
        raise ConfigError(
            f"--resume {job.folder}: its {', '.join(differs)} were others",
            "Give the same flags, or leave --resume away",
        )
