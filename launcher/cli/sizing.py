"""`pd-launch size`: how many prefill and decode nodes?"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .. import private
from ..errors import ConfigError, InterruptedStart
from ..events.apart import apart
from ..events.events import Events
from ..events.screen import OnScreen
from ..hosts.local.host import LocalHost
from ..inspect import runs
from ..measure import size as sizing
from ..measure import sized_pair, traces
from ..measure.calibrate import Measured
from ..measure.size import Checked, Sized
from ..measure.slo import Slo, seconds
from ..measure.starting import refuse_longer
from ..measure.workload import Workload
from ..plan.config import LaunchConfig
from ..plan.lockfile import LockFile
from ..plan.planner import served_names
from .comparing import now
from .flags import from_flags
from .output import out
from .workloads import (
    PieceTokensFlag,
    RateFlag,
    RequestsFlag,
    ScaleFlag,
    SeedFlag,
    SloFlag,
    TraceFlag,
    WorkloadFlag,
    workload_of,
)

_SHOWN = 8
_COMPARED = 5
"""Comparisons that are predicted again, the last ones."""


@from_flags
def size(  # noqa: PLR0913, PLR0917  its flags
    config: LaunchConfig,
    lock: LockFile | None,
    nodes: Annotated[int, typer.Option(metavar="N", min=2, help="How many nodes the devices make.")],
    slo: SloFlag,
    trace: TraceFlag = None,
    workload: WorkloadFlag = None,
    requests: RequestsFlag = 2000,
    rate: RateFlag = None,
    scale: ScaleFlag = 1.0,
    piece_tokens: PieceTokensFlag = traces.PIECE_TOKENS,
    seed: SeedFlag = 0,
    constants: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured before, or made up: nothing is started.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,  # noqa: FBT002
) -> None:
    """Measure a prefill and a decode node, and say how many of each some requests need."""
    if lock is not None:
        raise ConfigError("--locked repeats one run, and does not go with `size`")
    found, limits = workload_of(trace, workload, requests, rate, scale, piece_tokens, seed), Slo.parse(slo)
    refuse_longer(found, config.max_model_len)
    with private.files():
        measured = sizing.read(constants) if constants is not None else _measured(config, found, quiet=as_json)
    sized = asyncio.run(sizing.size(measured.constants, found, limits, nodes))
    checked = asyncio.run(_checked(measured, config))
    if as_json:
        sys.stdout.write(orjson.dumps(sizing.as_data(sized, measured, limits, checked)).decode() + "\n")
    else:
        out.print(Group(*_shown(sized, measured, found, limits, checked)), highlight=False)


def _measured(config: LaunchConfig, workload: Workload, *, quiet: bool) -> Measured:
    folder = (config.run_dir or runs.folder().parent / "sized" / now()).expanduser().absolute()
    screen = OnScreen(out)
    with apart(screen) as sink:
        events = Events(*([] if quiet else [sink]), live=None if quiet else screen.live)
        try:
            measured = asyncio.run(sized_pair.measure(config, workload, folder, LocalHost(), events))
        except KeyboardInterrupt:
            raise InterruptedStart("interrupted before everything was measured") from None
    private.write(folder / "constants.json", orjson.dumps(measured.as_data()).decode())
    events.say(f"Constants: {folder / 'constants.json'} (--constants takes them)", "text")
    return measured


async def _checked(measured: Measured, config: LaunchConfig) -> list[Checked]:
    folder = runs.folder().parent / "compared"
    folders = sorted(folder.glob("*"))[-_COMPARED:]
    return await sizing.checked_against(folders, measured.constants, served_names(config)[0], traces.from_file)


def _shown(
    sized: Sized, measured: Measured, workload: Workload, slo: Slo, checked: list[Checked]
) -> list[RenderableType]:
    """For a screen of 80 columns."""
    best, *others = sized.outcomes
    told = traces.in_words(workload)
    parts: list[RenderableType] = [
        f"{told['requests']} requests of {told['name']} at {told['rate']:.3g}/s, {slo}, in a model of a measured pair",
        "",
        _table(sized),
        "",
        f"Take {best.arm}: {best.figures.goodput:.3g} good answers a second ({best.share:.0%}).",
    ]
    if others:
        parts.append(f"Next: {others[0].arm}, {others[0].figures.goodput:.3g} ({others[0].share:.0%}).")
    parts += [_more_traffic(sized, slo), "", *_constants(measured, workload)]
    parts += [
        f"  {one.arm} of comparison {one.folder.name}: {one.predicted:.3g} good answers a second predicted, "
        f"{one.measured:.3g} measured"
        for one in checked
    ]
    return [Text(part) if isinstance(part, str) else part for part in parts]


def _table(sized: Sized) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "goodput/s", "% good", "ttft p90", "tpot p90", "busy", "binds"):
        table.add_column(name, justify="right" if name not in ("", "busy") else "left")
    for one in sized.outcomes[:_SHOWN]:
        table.add_row(
            str(one.arm), f"{one.figures.goodput:.3g}", f"{100 * one.share:.0f}", seconds(one.figures.ttft["p90"]),
            seconds(one.figures.tpot["p90"]), ", ".join(f"{name} {share:.0%}" for name, share in one.busy.items()),
            max(one.spent, key=lambda name: one.spent[name]),
        )  # fmt: skip
    return table


def _more_traffic(sized: Sized, slo: Slo) -> str:
    if sized.stressed is None:
        return f"With {sizing.MORE_TRAFFIC - 1:.0%} more traffic it still does."
    missed = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "the end-to-end time"}
    strain = {
        name: getattr(sized.stressed.figures, name)["p90"] / limit
        for name in missed
        if (limit := getattr(slo, name)) is not None
    }
    first = missed[max(strain, key=lambda name: strain[name])]
    return f"With {sizing.MORE_TRAFFIC - 1:.0%} more traffic {first} breaks first: add {sized.next_node}."


def _constants(measured: Measured, workload: Workload) -> list[str]:
    a, b, c = measured.constants.prefill
    d, e, f = measured.constants.decode
    g, h = measured.constants.hand_off
    off = measured.errors()
    told = [
        "Measured (and the largest error of what was measured, predicted again)",
        f"  prefill   {a:.3g} s + {b:.3g} a token + {c:.3g} a token²  {_error(off['prefill'])}",
        f"  decode    {d:.3g} s + {e:.3g} a sequence + {f:.3g} a token of KV, a step  {_error(off['decode'])}",
        f"  hand-off  {g:.3g} s + {h:.3g} a token  {_error(off['hand_off'])}",
        f"  KV        {measured.constants.kv_tokens} tokens a node",
    ]
    longest = max((tokens for tokens, _ in measured.prefill), default=0)
    beyond = sum(request.tokens > longest for request in workload.requests)
    if beyond and longest:
        told.append(f"  Extrapolated: {beyond} prompts are longer than the longest one measured ({longest} tokens)")
    if not measured.prefill:
        told.append("  Nothing was measured here: the constants are those of the file")
    return told


def _error(share: float) -> str:
    return f"(± {share:.0%})"
