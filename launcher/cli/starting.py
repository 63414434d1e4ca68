"""The commands that begin with a configuration: facts, plan, check, test, up."""

import asyncio
import dataclasses
import json
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from .. import private
from ..check.checks import check as check_plan
from ..check.findings import Checked, Finding
from ..errors import ConfigError, InterruptedStart
from ..events.apart import apart
from ..events.events import Event, Events, Sink
from ..events.files import AsJson, InLog
from ..events.screen import OnScreen
from ..events.systemd import ToSystemd
from ..hosts.local.host import LocalHost
from ..hosts.reserve import Reserved
from ..inspect import logs, runs
from ..inspect.runs import RunFolder
from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.lockfile import LockFile
from ..plan.plan import Plan
from ..plan.planner import make_plan
from ..plan.render import shell
from ..run.checked import reserve_checked
from . import detached, show
from .flags import from_flags
from .output import err, out

_SHOWN_WITHIN_S = 2.0
AsJsonFlag = Annotated[bool, typer.Option("--json", help="As JSON.")]
FactsFile = Annotated[
    Path | None,
    typer.Option("--facts", metavar="FILE", help="For the host that `pd-launch facts --json` was called on."),
]


@from_flags
def up(  # noqa: PLR0913, PLR0917  its flags
    config: LaunchConfig,
    lock: LockFile | None,
    detach: Annotated[  # noqa: FBT002
        bool, typer.Option("--detach", "-d", help="Return when it is ready, and leave it running.")
    ] = False,
    with_logs: Annotated[bool, typer.Option("--logs", help="Show the nodes' logs, too.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Each event as a line of JSON.")] = False,  # noqa: FBT002
    screen: Annotated[bool, typer.Option("--screen/--no-screen", hidden=True)] = True,  # noqa: FBT002
    claimed: Annotated[int | None, typer.Option("--claimed", hidden=True)] = None,
) -> None:
    """Check, start and watch the nodes and the proxy; Ctrl-C stops all of it."""
    if detach:
        if as_json or with_logs:
            raise ConfigError("--detach goes with neither --json nor --logs", "`pd-launch logs -f` shows them")
        detached.up(config, lock, out)
        return
    if as_json and with_logs:
        raise ConfigError("--json does not go with --logs", "`pd-launch logs -f` shows them")
    _point_out_remains()
    reserved, checked = reserve_checked(config, LocalHost(), lock)
    folder = RunFolder(reserved.plan.run_dir)
    on_screen = OnScreen(out)
    shown: Sink = AsJson(sys.stdout) if as_json else on_screen if screen else _nobody
    with closing(reserved.reservation), _claimed(folder, claimed), apart(shown) as sink:
        events = Events(InLog(folder.path / logs.OF_THE_LAUNCHER), sink, ToSystemd.wanted() or _nobody)
        if shown is on_screen:
            events.live = on_screen.live
        _warn(reserved.plan, checked, events)
        with _nodes_logs(folder) if with_logs else nullcontext():
            _run(_up(config, reserved, folder, events, has_terminal=screen))


def _nobody(event: Event) -> None:
    del event


async def _up(
    config: LaunchConfig, reserved: Reserved, folder: RunFolder, events: Events, *, has_terminal: bool
) -> None:
    from ..run.supervisor import Supervisor  # noqa: PLC0415  it brings the HTTP client

    await Supervisor(config, reserved, LocalHost(), folder, events, has_terminal=has_terminal).run()


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Raises InterruptedStart for a signal that came before the run heard signals itself."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        raise InterruptedStart("interrupted before everything was up") from None


@contextmanager
def _claimed(folder: RunFolder, handle: int | None = None) -> Iterator[None]:
    """What an earlier run left there is set aside; all that this one makes is for this user only.

    `handle`: of a claim that whoever started us has made already.
    """
    with private.files():
        if handle is None:
            folder.claim()
        else:
            folder.adopt(handle)
        try:
            if handle is None:
                folder.set_aside()
            runs.forget_old()
            yield
        finally:
            folder.release()


def _warn(plan: Plan, checked: list[Checked], events: Events) -> None:
    for line in plan.passed_over:
        events.say(line, "warning")
    for one in checked:
        for finding in one.findings:
            events.say(show.finding_text(finding), "warning")


@contextmanager
def _nodes_logs(folder: RunFolder) -> Iterator[None]:
    """On the screen as they grow, each line with its node's name: in a thread, for a screen that takes no more."""
    over = threading.Event()
    work = partial(show.followed, out, lambda: _logs_of_nodes(folder), over)
    showing = threading.Thread(target=work, name="nodes' logs", daemon=True)
    showing.start()
    try:
        yield
    finally:
        over.set()
        showing.join(_SHOWN_WITHIN_S)


def _logs_of_nodes(folder: RunFolder) -> list[Path]:
    return [file for file in logs.files_of(folder.path) if file.name != logs.OF_THE_LAUNCHER]


def _point_out_remains() -> None:
    """What earlier runs left is shown, and never taken away without being asked."""
    for run, _, left, files in runs.remains():
        err.print(
            f"[yellow]An earlier run left {len(left)} processes and {len(files)} files ({run.path}).[/] "
            "`pd-launch clean --yes` removes them.",
            highlight=False,
            soft_wrap=True,
        )


@from_flags
def plan(  # noqa: PLR0913, PLR0917  its flags
    config: LaunchConfig,
    lock: LockFile | None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Commands and environment, too.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,  # noqa: FBT002
    as_shell: Annotated[  # noqa: FBT002
        bool, typer.Option("--shell", help="As a shell script that starts the same by hand.")
    ] = False,
    facts_file: FactsFile = None,
) -> None:
    """Show everything `up` would start, and start nothing."""
    facts = _facts(config, facts_file, engine=False)
    made = make_plan(config, facts, lock.seats if lock else ())
    if as_json:
        sys.stdout.write(made.without_secrets().as_json() + "\n")
    elif as_shell:
        sys.stdout.write(shell.script(made))
    else:
        show.plan(out, made.without_secrets(), verbose=verbose)


@from_flags
def check(
    config: LaunchConfig,
    lock: LockFile | None,
    as_json: AsJsonFlag = False,  # noqa: FBT002
    facts_file: FactsFile = None,
) -> None:
    """Check everything that `up` checks, and start nothing. Exit code 0 when `up` would go on."""
    facts = _facts(config, facts_file)
    made = make_plan(config, facts, lock.seats if lock else ())
    checked = check_plan(config, made, facts, lock)
    if facts_file is None and RunFolder(made.run_dir).is_alive:
        used = Finding(
            "error", f"another run uses {made.run_dir}", "", "Choose another --run-dir", ConfigError.exit_code
        )
        checked.append(Checked("run folder", str(made.run_dir), (used,)))
    findings = [finding for one in checked for finding in one.findings]
    if as_json:
        sys.stdout.write(json.dumps([dataclasses.asdict(one) for one in checked], indent=1) + "\n")
    else:
        show.checked(out, checked)
    codes = [finding.exit_code for finding in findings if finding.severity == "error"]
    raise typer.Exit(codes[0] if codes else 0)


@from_flags
def test(config: LaunchConfig, lock: LockFile | None) -> None:
    """Try it in stages: transfer engine, each node, their addresses, one request through both. Stops at a failure."""
    from ..run import selftest  # noqa: PLC0415  it brings the HTTP client

    reserved, checked = reserve_checked(config, LocalHost(), lock)
    folder = RunFolder(reserved.plan.run_dir)
    screen = OnScreen(out)
    with closing(reserved.reservation), _claimed(folder), apart(screen) as sink:
        events = Events(sink, InLog(folder.path / logs.OF_THE_LAUNCHER), live=screen.live)
        _warn(reserved.plan, checked, events)
        _run(selftest.run(config, reserved, LocalHost(), folder, events))


@from_flags
def facts(config: LaunchConfig, lock: LockFile | None, as_json: AsJsonFlag = False) -> None:  # noqa: FBT002
    """What this host is like, as plans and checks see it. Secrets are left out."""
    del lock
    found = LocalHost().facts(config).without_secrets()
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=1) + "\n")
    else:
        show.facts(out, found)


def _facts(config: LaunchConfig, file: Path | None, *, engine: bool = True) -> HostFacts:
    """Of this host, or those in the file. Raises ConfigError."""
    if file is None:
        return LocalHost().facts(config, engine=engine)
    try:
        return HostFacts.model_validate_json(file.read_text())
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
    except ValidationError as exc:
        problem = exc.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{file} has no facts of a host: {place}: {problem['msg']}") from exc
