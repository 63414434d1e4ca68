"""`pd-launch`: the commands. Errors become one line and an exit code here, and nowhere else."""

import asyncio
import dataclasses
import inspect
import io
import json
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape

from engines.base import foreign_owners

from . import detached, doctor, logs, operate, preflight, runs, selftest, setup, shell, show, status
from .config import TINY_MODEL, LaunchConfig, flag_of, load
from .errors import ConfigError, LauncherError
from .plan import Plan, make_plan
from .ports import Locks
from .progress import Progress, Screen
from .reserve import LockFile, reserve, survey
from .runs import RunFolder
from .supervisor import Supervisor

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they would print the values of local variables, secrets among them
    help="Plan, check, start and watch prefill/decode-disaggregated vLLM nodes with the Mooncake transfer engine.",
)
_WIDE = 240
"""Columns of a screen that is none: a table in a pipe or a file is never cut."""
_out = Screen(width=None if sys.stdout.isatty() else _WIDE)
_err = Console(stderr=True)


def _from_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each field of LaunchConfig, and --config; it gets the loaded configuration.

    The flags are the configuration file's keys, so there is one list of them: the model's fields.
    """
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in ("config", "lock")
    ]
    flags = [_flag(name) for name in LaunchConfig.model_fields]
    file = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with these flags as keys.")],
    )
    locked = file.replace(
        name="locked",
        annotation=Annotated[
            Path | None, typer.Option(metavar="FILE", help="Repeat the run that wrote this lock.json, ports and all.")
        ],
    )

    def with_configuration(config: Path | None, locked: Path | None, **values: Any) -> None:
        flags = {name: values.pop(name) for name in list(values) if name in LaunchConfig.model_fields}
        given = {name: value for name, value in flags.items() if value is not None}
        lock = LockFile.read(locked) if locked else None
        command(config=lock.repeated(given, config) if lock else load(given, config), lock=lock, **values)

    with_configuration.__doc__ = command.__doc__
    with_configuration.__name__ = command.__name__
    with_configuration.__signature__ = inspect.Signature([file, locked, *flags, *own])  # type: ignore[attr-defined]
    return with_configuration


def _flag(name: str) -> inspect.Parameter:
    """Values are checked by the model, whose messages name the flag or the file they came from."""
    field = LaunchConfig.model_fields[name]
    many = get_origin(field.annotation) in (tuple, dict) and name != "devices"
    is_switch = field.annotation is bool
    kind: Any = bool if is_switch else list[str] if many else str
    shown = field.default if not many and field.default not in (None, ()) and not field.is_required() else None
    default = f" [default: {shown}]" if shown is not None else ""
    choices = "|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None
    flag = f"{flag_of(name)}/--no-{name}" if is_switch else flag_of(name)
    option = typer.Option(
        flag,
        help=f"{field.description}{default}",
        metavar=None if is_switch else choices or _metavar(name),
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(name: str) -> str:
    if name.endswith("_ports"):
        return "FIRST-LAST"
    if name in ("prefill", "decode", "proxy_port") or name.endswith(("_s", "_len", "_node")):
        return "N"
    return {"engine_python": "PATH", "run_dir": "PATH", "devices": "IDS", "env": "NAME=VALUE"}.get(name, "TEXT")


RunDir = Annotated[
    Path | None, typer.Option("--run-dir", metavar="PATH", help="Which run. [default: the one that is alive]")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("up")
@_from_flags
def up(
    config: LaunchConfig,
    lock: LockFile | None,
    detach: Annotated[  # noqa: FBT002
        bool, typer.Option("--detach", "-d", help="Return when it is ready, and leave it running.")
    ] = False,
) -> None:
    """Check, start and watch the nodes and the proxy; Ctrl-C stops all of it."""
    if detach:
        detached.up(config, lock, _out)
        return
    _point_out_remains()
    plan, locks = reserve(config, lock)
    for line in plan.passed_over:
        _out.print(line, highlight=False, soft_wrap=True, markup=False)
    _tell(preflight.check(config, plan, lock.versions if lock else {}))
    asyncio.run(_up(config, plan, locks))


def _tell(findings: list[preflight.Finding]) -> None:
    """Warnings to the screen; raises the first error."""
    preflight.refuse_errors(findings)
    for finding in findings:
        show.finding(_out, finding)


async def _up(config: LaunchConfig, plan: Plan, locks: Locks) -> None:
    progress = Progress(_out)
    if config.model == TINY_MODEL and config.engine == "vllm":
        async with progress.shown():
            await setup.make_tiny_model(progress, Path(plan.nodes[0].command[0]))
    folder = RunFolder(plan.run_dir)
    folder.claim()
    try:
        folder.set_aside()
        LockFile.of(config, plan).write(plan.run_dir)
        await Supervisor(config, plan, locks, folder, progress).run()
    finally:
        folder.release()


def _point_out_remains() -> None:
    """What earlier runs left is shown, and never taken away without being asked."""
    for run, _, left, files in runs.remains():
        _err.print(
            f"[yellow]An earlier run left {len(left)} processes and {len(files)} files ({run.path}).[/] "
            "`pd-launch clean --yes` takes them away.",
            highlight=False,
            soft_wrap=True,
        )


@app.command("plan")
@_from_flags
def plan_command(
    config: LaunchConfig,
    lock: LockFile | None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,  # noqa: FBT002
    as_shell: Annotated[  # noqa: FBT002
        bool, typer.Option("--shell", help="As a shell script that starts the same by hand.")
    ] = False,
) -> None:
    """Show everything `up` would start, and start nothing."""
    plan = make_plan(config, survey(config), lock.seats if lock else ())
    if as_json:
        sys.stdout.write(plan.without_secrets().as_json() + "\n")
    elif as_shell:
        sys.stdout.write(shell.script(plan))
    else:
        show.plan(_out, plan.without_secrets())


@app.command("check")
@_from_flags
def check_command(config: LaunchConfig, lock: LockFile | None, as_json: AsJson = False) -> None:  # noqa: FBT002
    """Check everything that `up` checks, and start nothing. Exit code 0 when `up` would go on."""
    plan = make_plan(config, survey(config), lock.seats if lock else ())
    findings = preflight.check(config, plan, lock.versions if lock else {})
    if as_json:
        sys.stdout.write(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        for finding in findings:
            show.finding(_out, finding)
        errors = sum(finding.severity == "error" for finding in findings)
        _out.print(f"{errors} errors, {len(findings) - errors} warnings", highlight=False)
    codes = [finding.exit_code for finding in findings if finding.severity == "error"]
    raise typer.Exit(codes[0] if codes else 0)


@app.command("test")
@_from_flags
def test_command(config: LaunchConfig, lock: LockFile | None) -> None:
    """Try it in stages: transfer engine, each node, their addresses, one request through both. Stops at a failure."""
    plan, locks = reserve(config, lock)
    _tell(preflight.check(config, plan, lock.versions if lock else {}))
    asyncio.run(_test(config, plan, locks))


async def _test(config: LaunchConfig, plan: Plan, locks: Locks) -> None:
    progress = Progress(_out)
    folder = RunFolder(plan.run_dir)
    folder.claim()
    try:
        folder.set_aside()
        await selftest.run(config, plan, locks, folder, progress)
    finally:
        folder.release()


@app.command("status")
def status_command(
    run_dir: RunDir = None,
    as_json: AsJson = False,  # noqa: FBT002
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every two seconds, until Ctrl-C.")] = False,  # noqa: FBT002
) -> None:
    """Nodes, ports, health, load and the proof that KV moves. Exit code 0 when the run serves."""
    found = asyncio.run(status.of(runs.choose(run_dir)))
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    elif watch:
        show.watched(_out, lambda: asyncio.run(status.of(runs.choose(run_dir))))
    else:
        show.status(_out, found)
    raise typer.Exit(0 if found["health"] in ("ok", "degraded") else 1)


@app.command("stop")
def stop_command(run_dir: RunDir = None) -> None:
    """Stop a run, as Ctrl-C would. Well when there is nothing to stop."""
    try:
        run = runs.choose(run_dir, alive=True)
    except runs.NoRunError:
        _out.print("Nothing is running.", highlight=False)
        return
    operate.stop(run, _say)


@app.command("restart")
def restart_command(node: str, run_dir: RunDir = None) -> None:
    """Drain one node (or the proxy), stop it and start it again."""
    operate.tell(runs.choose(run_dir, alive=True), {"do": "restart", "node": node}, _say)


@app.command("scale")
def scale_command(
    prefill: Annotated[int | None, typer.Option(metavar="N", help="Number of prefill nodes.")] = None,
    decode: Annotated[int | None, typer.Option(metavar="M", help="Number of decode nodes.")] = None,
    run_dir: RunDir = None,
) -> None:
    """Start further nodes on free ports of the ranges, or drain and stop the last ones."""
    if prefill is None and decode is None:
        raise ConfigError("how many? Give --prefill N, --decode M, or both")
    command = {"do": "scale", "prefill": prefill, "decode": decode}
    operate.tell(runs.choose(run_dir, alive=True), command, _say)


@app.command("logs")
def logs_command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NODE]...", help="[default: all, in one time line]")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow, until Ctrl-C.")] = False,  # noqa: FBT002
    tail: Annotated[int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last lines.")] = None,
    run_dir: RunDir = None,
) -> None:
    """All nodes' logs in one time line, or some nodes' only."""
    files = logs.files_of(runs.choose(run_dir).path, names or [])
    asyncio.run(show.logs(_out, files, tail, follow=follow))


@app.command("doctor")
def doctor_command(
    places: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER|LOG]...", help="[default: the last run]")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Read all nodes' logs and say what failed first, on which node, why, and how to fix it. Exit code 1 then."""
    places = places or [runs.choose(None).path]
    files = doctor.logs_in(places)
    diagnosis = doctor.examine(files, ends=doctor.ends_in(places))
    if as_json:
        sys.stdout.write(json.dumps(doctor.as_data(diagnosis), indent=1) + "\n")
    else:
        if diagnosis.first is None:
            _out.print(
                f"Nothing known to be wrong in {len(files)} {'log' if len(files) == 1 else 'logs'}.", highlight=False
            )
        _out.out(doctor.in_words(diagnosis), highlight=False)
    raise typer.Exit(0 if diagnosis.first is None else 1)


@app.command("clean")
def clean_command(
    yes: Annotated[bool, typer.Option("--yes", help="Do it, not only show it.")] = False,  # noqa: FBT002
) -> None:
    """End what runs left behind whose launcher was killed: processes, shared memory, temporary folders."""
    operate.clean(_say, do_it=yes)


def _say(text: str) -> None:
    _out.print(text, highlight=False, soft_wrap=True, markup=False)


@app.command("setup")
def setup_command(
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Which build of the engine.")] = "cpu",
    engine_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Check this environment instead of making one.")
    ] = None,
    print_python: Annotated[  # noqa: FBT002
        bool, typer.Option("--print-python", help="Print the interpreter of the environment, and do nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --device cuda: install, not only show.")] = False,  # noqa: FBT002
) -> None:
    """Make the engine's environment (vLLM and Mooncake), and see that it works. Quick when it is there."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: should be cpu or cuda")
    environment = setup.EngineEnvironment.of("cuda" if device == "cuda" else "cpu")
    if print_python:
        sys.stdout.write(f"{engine_python or environment.python}\n")
    elif engine_python is not None:
        _out.print_json(json.dumps(setup.engine_versions(engine_python)))
    elif device == "cuda" and not yes and not environment.is_complete:
        _out.print("This would be run (add --yes to run it):", highlight=False)
        for _, command in environment.commands():
            _out.out(f"  {shlex.join(command)}", highlight=False)
    else:
        asyncio.run(_setup(environment))


async def _setup(environment: setup.EngineEnvironment) -> None:
    progress = Progress(_out)
    async with progress.shown():
        if environment.device == "cuda":
            progress.say(f"vLLM {setup.VLLM_VERSION} is built for CUDA 13: NVIDIA driver {setup.CUDA_DRIVER} or newer.")
        await setup.install_libraries(progress, environment.device, environment.log)
        await environment.make(progress)
        if environment.device == "cpu":
            await setup.make_tiny_model(progress, environment.python)
    versions = setup.quick_versions(environment.python)
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    progress.say(f"engine environment: {environment.folder}\n  {listed}")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a screen that knows no ✓ ends no run
    try:
        others = foreign_owners(packages_distributions())
        if others:
            raise ConfigError(f"these installed packages take our names: {others}", "Use an environment of its own")
        app()
    except LauncherError as exc:
        _err.print(f"[red]pd-launch:[/] {escape(str(exc))}", highlight=False, soft_wrap=True)
        if exc.hint:
            _err.print(exc.hint, highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(exc.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
