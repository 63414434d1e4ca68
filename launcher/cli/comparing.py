"""`pd-launch compare`: is it worth it here?"""

import asyncio
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .. import private
from ..errors import ConfigError, InterruptedStart
from ..events.apart import apart
from ..events.events import Events
from ..events.screen import OnScreen
from ..hosts.local.host import LocalHost
from ..inspect import runs
from ..measure import compare as comparing
from ..measure import traces
from ..measure.arms import arms as arms_of
from ..measure.report import Report
from ..measure.slo import Slo
from ..measure.starting import refuse_longer
from ..plan.config import LaunchConfig
from ..plan.lockfile import LockFile
from .flags import from_flags
from .output import out, say
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


@from_flags
def compare(  # noqa: PLR0913, PLR0917  its flags
    config: LaunchConfig,
    lock: LockFile | None,
    arms: Annotated[str, typer.Option(metavar="A,B", help="What to compare: 2P1D, 3 (ordinary nodes), 3B (both).")],
    slo: SloFlag,
    trace: TraceFlag = None,
    workload: WorkloadFlag = None,
    requests: RequestsFlag = 400,
    rate: RateFlag = None,
    scale: ScaleFlag = 1.0,
    piece_tokens: PieceTokensFlag = traces.PIECE_TOKENS,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Of each arm.")] = 3,
    seed: SeedFlag = 0,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Go on with one that was interrupted.")] = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture (PNG); needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,  # noqa: FBT002
) -> None:
    """The same requests for different nodes on the same devices: which serves more of them in time, and why."""
    if lock is not None:
        raise ConfigError("--locked repeats one run, and does not go with `compare`")
    if chart is not None and find_spec("matplotlib") is None:
        raise ConfigError("--chart needs matplotlib", "pip install 'pd-launch[chart]'")
    found = workload_of(trace, workload, requests, rate, scale, piece_tokens, seed)
    folder = (resume or config.run_dir or runs.folder().parent / "compared" / now()).expanduser().absolute()
    job = comparing.Job(config, tuple(arms_of(arms)), found, Slo.parse(slo), rounds, folder)
    for arm in job.arms:
        arm.config(config)
    refuse_longer(found, config.max_model_len)
    with private.files():
        comparing.begin(job, resume=resume is not None)
        report = _report(job, quiet=as_json)
        report.write()
    if as_json:
        sys.stdout.write(report.as_json() + "\n")
    else:
        out.print(report.shown(), highlight=False)
    if chart is not None:
        report.draw(chart)
    raise typer.Exit(0 if report.verdict is not None else 1)


def _report(job: comparing.Job, *, quiet: bool) -> Report:
    screen = OnScreen(out)
    with apart(screen) as sink:
        events = Events(*([] if quiet else [sink]), live=None if quiet else screen.live)
        try:
            found = asyncio.run(comparing.Comparison(job, LocalHost(), events).run())
        except (InterruptedStart, KeyboardInterrupt):
            say(f"\nInterrupted. The same command with --resume {job.folder} goes on with the rounds that are missing.")
            raise typer.Exit(130) from None
    return Report(job, found)


def now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
