"""The flags that say which requests are measured with, for `compare` and `size`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..measure import traces
from ..measure.compare import FEWEST_REQUESTS
from ..measure.workload import Workload

SloFlag = Annotated[str, typer.Option(metavar="LIMITS", help="What a good answer keeps: ttft=2s,tpot=50ms[,e2e=30s].")]
TraceFlag = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Requests: a trace in Mooncake's form, or ShareGPT's JSON.")
]
WorkloadFlag = Annotated[
    str | None, typer.Option(metavar="TEXT", help="... or made: conversations, or input=2000,output=200,rate=2.")
]
RequestsFlag = Annotated[int, typer.Option(metavar="N", min=1, help="So many of them, the first.")]
RateFlag = Annotated[float | None, typer.Option(metavar="R", min=1e-6, help="Requests a second, in the mean.")]
ScaleFlag = Annotated[float, typer.Option(metavar="F", min=1e-6, help="Prompts and answers so many times as long.")]
PieceTokensFlag = Annotated[
    int, typer.Option(metavar="N", min=1, help="Tokens that each hash id of the trace stands for.")
]
SeedFlag = Annotated[int, typer.Option(metavar="N", help="Of what is made.")]


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
    if len(made.requests) < FEWEST_REQUESTS:
        raise ConfigError(
            f"{made.name}: {len(made.requests)} requests are too few for a verdict",
            f"Give {FEWEST_REQUESTS} or more (--requests)",
        )
    if not made.seconds and rate is None:
        raise ConfigError(
            f"{made.name}: its requests have no times, and goodput of a closed loop means nothing",
            "Give --rate, in requests a second",
        )
    made = made.scaled(scale) if scale != 1 else made
    return made.at_rate(rate, seed) if rate is not None else made
