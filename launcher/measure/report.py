"""What was found out: for the screen, as data, and as a picture."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import orjson
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .. import private
from . import stages, traces, verdict
from .arms import Arm
from .compare import Found, Job
from .loadgen import Row
from .results import Figures, figures, ttft
from .slo import seconds
from .verdict import SloMap, Spread, Verdict

_PARTS: Mapping[stages.Binding, str] = {
    "prefill": "prefill nodes", "decode": "decode nodes", "transfer": "the hand-off", "proxy": "the proxy",
    "nodes": "the nodes",
}  # fmt: skip
_REMEDIES: Mapping[stages.Binding, str] = {
    "transfer": ": look at --transfer-protocol, the network, and `pd-launch test`",
    "proxy": ": give it --workers, or higher limits (pd-proxy --help)",
}
_UNLIMITED = 10_000
"""Columns of a screen that any table fits in."""
_NEARLY_ALL = 0.99
"""Of the requests, within every limit."""


class Report:
    """Of one comparison."""

    def __init__(self, job: Job, found: Found) -> None:
        self.job = job
        self.found = found
        self._rows: dict[Arm, list[list[Row]]] = {arm: [one.rows for one in found.of(arm)] for arm in job.arms}
        self._figures: dict[Arm, list[Figures]] = {
            arm: [figures(rows, job.slo) for rows in rounds] for arm, rounds in self._rows.items()
        }
        counted = {str(arm): self._rows[arm] for arm in job.arms if found.counts(arm)}
        self.verdict: Verdict | None = verdict.verdict(counted, job.slo) if len(counted) > 1 else None
        self.map: SloMap = verdict.slo_map(counted, job.slo)

    # -- in words

    def shown(self) -> Group:
        """All of it, for a screen of 80 columns."""
        parts: list[RenderableType] = [*self._held(), "", self._table(), "", self.sentence(), ""]
        parts += [*self._where_the_time_went(), "", *self._map(), "", *self._again()]
        return Group(*(Text(part) if isinstance(part, str) else part for part in parts))

    def sentence(self) -> str:
        """The verdict, with its condition."""
        if self.verdict is not None:
            return self.verdict.in_words(self.job.slo, self.job.workload.rate)
        if all(not one.good for rounds in self._figures.values() for one in rounds) and not self.found.failed:
            return f"No verdict: no arm answered a request within {self.job.slo}."
        return "No verdict: fewer than two arms have a result."

    def _held(self) -> Iterator[str]:
        held, told = self.found.held, traces.in_words(self.job.workload)
        yield "Held constant"
        named = ",".join(held.get("devices_named", []))
        yield (
            f"  {held.get('devices', '?')} devices ({held.get('device', '?')}{' ' + named if named else ''}), "
            f"model {held.get('model', '?')}"
        )
        versions = ", ".join(f"{name} {version}" for name, version in held.get("versions", {}).items())
        yield f"  {versions or held.get('engine', '')}"
        yield (
            f"  workload {told['name']} ({told['digest']}): {told['requests']} requests at {told['rate']:.3g}/s, "
            f"prompts of {told['prompt_tokens']:.0f}"
        )
        yield f"  and answers of {told['output_tokens']:.0f} tokens in the mean, {told['shared']:.0%} of prompts shared"
        yield f"  SLO {self.job.slo}; {self.job.rounds} rounds, {', '.join(str(arm) for arm, _ in self.job.order)}"
        yield "  other prompts in each round (nothing is cached from an earlier one); warm-up not counted"

    def _table(self) -> RenderableType:
        table = _Columns("", *map(str, self.job.arms))
        columns = [verdict.over_rounds(rounds) if rounds else {} for rounds in self._figures.values()]
        for name in next((column for column in columns if column), {}):
            table.add_row(name, *(verdict.in_words(name, column[name]) if column else "-" for column in columns))
            if name == "goodput, requests/s":
                table.add_row("... a device", *(self._a_device(column) for column in columns))
        table.add_row("KV proven moved", *map(self._moved, self.job.arms))
        return table

    def _a_device(self, column: Mapping[str, Spread]) -> str:
        goodput = column.get("goodput, requests/s")
        return f"{goodput.median / self.found.held.get('devices', 1):.3g}" if goodput else "-"

    def _moved(self, arm: Arm) -> str:
        if arm in self.found.failed:
            return "failed"
        shares = [one.moved for one in self.found.of(arm) if one.moved is not None]
        if not shares:
            return "-"
        return f"{min(shares):.0%}{' VOID' if self.found.is_void(arm) else ''}"

    def _where_the_time_went(self) -> Iterator[RenderableType]:
        yield Text("Where the time of a request went, in the mean")
        table = _Columns("", *map(str, self.job.arms))
        spent = [self.stages_of(arm) for arm in self.job.arms]
        for name in (name for name in stages.NAMES if any(name in one for one in spent)):
            table.add_row(name, *(seconds(one[name]) if name in one else "" for one in spent))
        yield table
        for arm in self.job.arms:
            yield Text(f"{arm}: {self.told_of(arm)}")

    def stages_of(self, arm: Arm) -> dict[str, float]:
        """Seconds of each, the median of the rounds."""
        rounds = [one.stages.seconds for one in self.found.of(arm)]
        return {name: median(one[name] for one in rounds) for name in rounds[0]} if rounds else {}

    def binding_of(self, arm: Arm) -> stages.Binding | None:
        rounds = self.found.of(arm)
        if not rounds:
            return None
        found = [
            stages.binding(one.stages.seconds, measured, self.job.slo)
            for one, measured in zip(rounds, self._figures[arm], strict=True)
        ]
        return max(found, key=found.count)

    def told_of(self, arm: Arm) -> str:
        """What binds it, and what to try; or why it has no result."""
        if arm in self.found.failed:
            return f"failed: {self.found.failed[arm]}"
        binds = self.binding_of(arm)
        if binds is None:
            return "no round"
        if self.found.is_void(arm):
            return "void: its KV did not move, so what was measured is something else"
        load = "; ".join(
            f"on a {f'{role} ' if arm.prefill else ''}node {share['computing']:.1f} requests, {share['waiting']:.1f} "
            f"waiting, {share['kv_usage']:.0%} of KV in use"
            for role, share in self._load(arm).items()
        )
        if all(one.good >= _NEARLY_ALL * one.requests for one in self._figures[arm]):
            return f"every limit is kept; nearest to one: {_PARTS[binds]} ({load})"
        return f"what binds: {_PARTS[binds]} ({load}){_REMEDIES.get(binds, _try(arm, binds))}"

    def _load(self, arm: Arm) -> dict[str, dict[str, float]]:
        rounds = [one.stages.load for one in self.found.of(arm)]
        return {
            role: {name: fmean(one[role][name] for one in rounds if role in one) for name in rounds[0][role]}
            for role in rounds[0]
        }

    def _map(self) -> Iterator[RenderableType]:
        yield Text("Which arm has the most goodput for other targets (=: within 5 %; -: nobody is in time)")
        found = self.map
        table = _Columns("TTFT \\ TPOT", *(f"≤ {seconds(tpot)}" for tpot in found.tpot))
        for wait, row in zip(found.ttft, found.winners, strict=True):
            table.add_row(f"≤ {seconds(wait)}", *(winner or "-" for winner in row))
        yield table

    def _again(self) -> Iterator[str]:
        trace = self.job.folder / "trace.jsonl"
        yield f"Results: {self.job.folder} (report.json has a row for each request)"
        yield "The same requests from other tools, at a running deployment:"
        limits = {"ttft": self.job.slo.ttft, "tpot": self.job.slo.tpot, "e2el": self.job.slo.e2e}
        goodput = " ".join(f"{name}:{1000 * limit:g}" for name, limit in limits.items() if limit is not None)
        yield (
            f"  vllm bench serve --base-url URL --model {self.found.held.get('model', 'NAME')} "
            f"--num-prompts {len(self.job.workload.requests)} "
            f"--dataset-name timed_trace --dataset-path {shlex.quote(str(trace))} "
            f"--timed-trace-chunk-hash-size {self.job.workload.piece_tokens} --timed-trace-sec-multiplier 0.001 "
            f"--ignore-eos --goodput {goodput}"
        )
        yield f"  aiperf profile --custom-dataset-type mooncake_trace --fixed-schedule --input-file {trace}"

    # -- as data

    def as_data(self) -> dict[str, Any]:
        """Everything, with a row for each request."""
        return {
            "held": self.found.held | {"workload": traces.in_words(self.job.workload), "slo": asdict(self.job.slo)},
            "rounds": self.job.rounds,
            "verdict": self.sentence(),
            "ratio": asdict(self.verdict) | {"is_difference": self.verdict.is_difference} if self.verdict else None,
            "arms": {str(arm): self._arm_as_data(arm) for arm in self.job.arms},
            "map": asdict(self.map),
        }

    def _arm_as_data(self, arm: Arm) -> dict[str, Any]:
        return {
            "counts": self.found.counts(arm),
            "void": self.found.is_void(arm),
            "failed": self.found.failed.get(arm),
            "binding": self.binding_of(arm),
            "stages": self.stages_of(arm),
            "rounds": [
                {
                    "figures": asdict(measured) | {"goodput": measured.goodput},
                    "moved": one.moved,
                    "stages": asdict(one.stages),
                    "requests": [asdict(row) for row in one.rows],
                }
                for one, measured in zip(self.found.of(arm), self._figures[arm], strict=True)
            ],
        }

    def as_json(self) -> str:
        """What is not finite, of an arm that answered nothing, is null."""
        return orjson.dumps(self.as_data()).decode()

    def write(self) -> None:
        """report.json and report.txt. Raises OSError."""
        private.write(self.job.folder / "report.json", self.as_json())
        private.write(self.job.folder / "report.txt", self.text())

    def text(self) -> str:
        """As a file has it."""
        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self.shown())
        return captured.get()

    def draw(self, file: Path) -> None:
        """How soon answers begin, where the time went, and who wins for other targets."""
        from matplotlib import pyplot as plt  # noqa: PLC0415  an extra

        figure, (waits, spent, winners) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
        self._draw_waits(waits)
        self._draw_stages(spent)
        self._draw_map(winners)
        figure.savefig(file, dpi=120)
        plt.close(figure)

    def _draw_waits(self, axes: Any) -> None:
        for arm in self.job.arms:
            waits = sorted(ttft(row) for rows in self._rows[arm] for row in rows if not row.problem)
            axes.step(waits, [(n + 1) / len(waits) for n in range(len(waits))], label=str(arm))
        axes.set(xlabel="TTFT, seconds", ylabel="share of the requests", xscale="log")
        axes.legend()

    def _draw_stages(self, axes: Any) -> None:
        spent = [self.stages_of(arm) for arm in self.job.arms]
        base = [0.0] * len(spent)
        for name in (name for name in stages.NAMES if any(name in one for one in spent)):
            heights = [one.get(name, 0.0) for one in spent]
            axes.bar(list(map(str, self.job.arms)), heights, bottom=base, label=name)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axes.set(ylabel="seconds of a request, in the mean")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

    def _draw_map(self, axes: Any) -> None:
        names = ["", "=", *map(str, self.job.arms)]
        axes.imshow([[names.index(winner) for winner in row] for row in self.map.winners], cmap="Pastel1", vmin=0)
        for y, row in enumerate(self.map.winners):
            for x, winner in enumerate(row):
                axes.text(x, y, winner, ha="center", va="center", fontsize="small")
        axes.set_xticks(range(len(self.map.tpot)), [f"≤ {seconds(tpot)}" for tpot in self.map.tpot])
        axes.set_yticks(range(len(self.map.ttft)), [f"≤ {seconds(wait)}" for wait in self.map.ttft])
        axes.set(xlabel="TPOT", ylabel="TTFT", title="most goodput")


def _try(arm: Arm, binds: stages.Binding) -> str:
    """The neighbour of the same size that has more of what binds."""
    if binds == "prefill" and arm.prefill:
        return f": try {arm.prefill + 1}P{arm.decode - 1}D" if arm.decode > 1 else ": it needs another prefill node"
    if binds == "decode" and arm.prefill:
        return f": try {arm.prefill - 1}P{arm.decode + 1}D" if arm.prefill > 1 else ": it needs another decode node"
    return ""


class _Columns:
    """A table with a column for each arm; those that do not fit beside each other stand below each other."""

    def __init__(self, first: str, *names: str) -> None:
        self._first = first
        self._names = names
        self._rows: list[tuple[str, tuple[str, ...]]] = []

    def add_row(self, name: str, *cells: str) -> None:
        self._rows.append((name, cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=_UNLIMITED)
        for beside in range(len(self._names), 0, -1):
            tables = [self._table(start, beside) for start in range(0, len(self._names), beside)]
            widest = max(Measurement.get(console, unlimited, table).maximum for table in tables)
            if widest <= options.max_width or beside == 1:
                yield from _separated(tables)
                return

    def _table(self, start: int, beside: int) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(self._first)
        for name in self._names[start : start + beside]:
            table.add_column(name, justify="right")
        for name, cells in self._rows:
            table.add_row(name, *cells[start : start + beside])
        return table


def _separated(tables: Sequence[Table]) -> Iterator[RenderableType]:
    for number, table in enumerate(tables):
        if number:
            yield Text()
        yield table
