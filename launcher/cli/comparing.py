"""`pd-launch compare`: is it worth it here?"""

import asyncio
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

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
from ..measure.workload import Workload
from ..plan.config import LaunchConfig
from ..plan.lockfile import LockFile
from .flags import from_flags
from .output import out, say


@from_flags
def compare(  # noqa: PLR0913, PLR0917  its flags
    config: LaunchConfig,
    lock: LockFile | None,
    arms: Annotated[str, typer.Option(metavar="A,B", help="What to compare: 2P1D, 3 (ordinary nodes), 3B (both).")],
    slo: Annotated[str, typer.Option(metavar="LIMITS", help="What a good answer keeps: ttft=2s,tpot=50ms[,e2e=30s].")],
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requests: a trace in Mooncake's form, or ShareGPT's JSON.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="... or made: conversations, or input=2000,output=200,rate=2."),
    ] = None,
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="So many of them, the first.")] = 400,
    rate: Annotated[float | None, typer.Option(metavar="R", min=1e-6, help="Requests a second, in the mean.")] = None,
    scale: Annotated[
        float, typer.Option(metavar="F", min=1e-6, help="Prompts and answers so many times as long.")
    ] = 1.0,
    piece_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that each hash id of the trace stands for.")
    ] = traces.PIECE_TOKENS,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Of each arm.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what is made.")] = 0,
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
    os.umask(0o077)
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


def workload_of(  # noqa: PLR0913, PLR0917  flags
    trace: Path | None,
    workload: str | None,
    requests: int,
    rate: float | None,
    scale: float,
    piece_tokens: int,
    seed: int,
) -> Workload:
    """Raises ConfigError."""
    if (trace is None) == (workload is None):
        raise ConfigError("what is to be sent? Give --trace FILE or --workload TEXT")
    made = traces.from_file(trace, piece_tokens) if trace else traces.made(workload or "", requests, seed)
    made = made.first(requests)
    if len(made.requests) < comparing.FEWEST_REQUESTS:
        raise ConfigError(
            f"{made.name}: {len(made.requests)} requests are too few for a verdict",
            f"Give {comparing.FEWEST_REQUESTS} or more (--requests)",
        )
    if not made.seconds and rate is None:
        raise ConfigError(
            f"{made.name}: its requests have no times, and goodput of a closed loop means nothing",
            "Give --rate, in requests a second",
        )
    made = made.scaled(scale) if scale != 1 else made
    return made.at_rate(rate, seed) if rate is not None else made


def now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
