"""The commands for runs that are there: ls, status, logs, doctor, restart, scale, stop, clean."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..inspect import doctor as diagnosing
from ..inspect import logs as log_files
from ..inspect import runs
from . import operate, show, show_trace
from .output import out, say

RunDir = Annotated[
    Path | None, typer.Option("--run-dir", metavar="PATH", help="Which run. [default: the one that is alive]")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _nodes(incomplete: str) -> list[str]:
    """For the shell's completion: the children of the run that is alive."""
    try:
        state = runs.choose(None).read()
    except ConfigError:
        return []
    return [child.name for child in (state.children if state else ()) if child.name.startswith(incomplete)]


def ls(as_json: AsJson = False) -> None:  # noqa: FBT002
    """All runs that are known here, the latest first."""
    found = [
        (run, state, runs.phase_of(run, state)) for run in reversed(runs.known()) if (state := run.read()) is not None
    ]
    if as_json:
        listed = [{"run_dir": str(run.path), "phase": phase, **_told(state)} for run, state, phase in found]
        sys.stdout.write(json.dumps(listed, indent=1) + "\n")
    else:
        show.listed(out, [(str(run.path), phase, state) for run, state, phase in found])


def _told(state: runs.RunState) -> dict[str, Any]:
    return state.model_dump(mode="json", include={"model", "proxy_url", "began", "host", "engine", "connector"})


def status(
    run_dir: RunDir = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Pids, ports, logs and ends, too.")] = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every two seconds, until Ctrl-C.")] = False,  # noqa: FBT002
) -> None:
    """Nodes, ports, health, load and the proof that KV moves. Exit code 0 when the run serves."""
    from ..inspect import status as looking  # noqa: PLC0415  it brings the HTTP client

    found = asyncio.run(looking.of(runs.choose(run_dir)))
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=1) + "\n")
    elif watch:
        show.watched(out, lambda: asyncio.run(looking.of(runs.choose(run_dir))), verbose=verbose)
    else:
        show.status(out, found, verbose=verbose)
    raise typer.Exit(0 if found.health in ("ok", "degraded") else 1)


def logs(  # noqa: PLR0913, PLR0917  its flags
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NODE]...", help="[default: all, in one time line]", autocompletion=_nodes),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow, until Ctrl-C.")] = False,  # noqa: FBT002
    tail: Annotated[int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last lines.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="From then on: 10m, 14:03, or a date and time.")
    ] = None,
    grep: Annotated[
        str | None, typer.Option("--grep", metavar="REGEX", help="Only lines in which this is found.")
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """All nodes' logs in one time line, or some nodes' only."""
    folder = runs.choose(run_dir).path
    first = log_files.files_of(folder, names or [])
    try:
        pattern = re.compile(grep) if grep is not None else None
    except re.error as exc:
        raise ConfigError(f"--grep {grep}: {exc}") from exc
    shown = show.Shown(tail, log_files.moment(since) if since is not None else None, pattern)
    later = (lambda: first) if names else (lambda: log_files.files_of(folder))
    asyncio.run(show.logs(out, first, later if follow else None, shown))


def trace(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="As in x-request-id and the proxy's log.")],
    run_dir: RunDir = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """One request by stages: nodes, attempts, times, what went wrong, and its log lines. Exit code 1 when unknown."""
    from ..inspect import trace as tracing  # noqa: PLC0415  it brings the HTTP client

    found = tracing.of(runs.choose(run_dir), request_id)
    if as_json:
        sys.stdout.write(json.dumps(tracing.as_data(found), indent=1) + "\n")
    else:
        show_trace.show(out, found)
    raise typer.Exit(0 if found.requests or found.lines else 1)


def doctor(
    places: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER|LOG]...", help="[default: the last run]")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Read all nodes' logs and say what failed first, on which node, why, and how to fix it. Exit code 1 then."""
    places = places or [runs.choose(None).path]
    files = diagnosing.logs_in(places)
    diagnosis = diagnosing.examine(files, ends=diagnosing.ends_in(places))
    if as_json:
        sys.stdout.write(json.dumps(diagnosing.as_data(diagnosis), indent=1) + "\n")
    else:
        if diagnosis.first is None:
            out.print(
                f"Nothing known to be wrong in {len(files)} {'log' if len(files) == 1 else 'logs'}.", highlight=False
            )
        out.out(diagnosing.in_words(diagnosis), highlight=False)
    raise typer.Exit(0 if diagnosis.first is None else 1)


def restart(node: Annotated[str, typer.Argument(autocompletion=_nodes)], run_dir: RunDir = None) -> None:
    """Drain one node (or the proxy), stop it and start it again. Ctrl-C breaks it off."""
    operate.tell(runs.choose(run_dir, alive=True), {"do": "restart", "node": node}, say)


def scale(
    prefill: Annotated[int | None, typer.Option(metavar="N", help="Number of prefill nodes.")] = None,
    decode: Annotated[int | None, typer.Option(metavar="M", help="Number of decode nodes.")] = None,
    both: Annotated[int | None, typer.Option(metavar="K", help="Number of nodes that do both.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Start further nodes on free ports of the ranges, or drain and stop the last ones. Ctrl-C breaks it off."""
    numbers = {"prefill": prefill, "decode": decode, "both": both}
    if not any(number is not None for number in numbers.values()):
        raise ConfigError("how many? Give --prefill N, --decode M, --both K, or several of them")
    command = {"do": "scale", **numbers}
    operate.tell(runs.choose(run_dir, alive=True), command, say)


def stop(
    run_dir: RunDir = None,
    every: Annotated[bool, typer.Option("--all", help="Every run that is alive here.")] = False,  # noqa: FBT002
) -> None:
    """Stop a run, as Ctrl-C would. Well when there is nothing to stop."""
    if every:
        living = [run for run in runs.known() if (state := run.read()) and state.is_here and run.is_alive]
    else:
        try:
            living = [runs.choose(run_dir, alive=True)]
        except runs.NoRunError:
            living = []
    if not living:
        operate.say_nothing_runs(say)
    else:
        operate.stop(living, say)


def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Do it, not only show it.")] = False,  # noqa: FBT002
) -> None:
    """End what runs left behind whose launcher was killed: processes, shared memory, temporary folders."""
    operate.clean(say, do_it=yes)
