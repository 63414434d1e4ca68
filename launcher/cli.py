"""`pd-launch`: the commands. Errors become one line and an exit code here, and nowhere else."""

import asyncio
import inspect
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
from rich.table import Table

from engines.base import foreign_owners

from . import facts, preflight, setup
from .config import TINY_MODEL, LaunchConfig, flag_of, load
from .errors import ConfigError, LauncherError
from .plan import NodeProcess, Plan, make_plan
from .progress import Progress
from .supervisor import Supervisor, clear_run_dir

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Plan, check, start and watch prefill/decode-disaggregated vLLM nodes with the Mooncake transfer engine.",
)
_out = Console()
_err = Console(stderr=True)


def _from_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each field of LaunchConfig, and --config; it gets the loaded configuration.

    The flags are the configuration file's keys, so there is one list of them: the model's fields.
    """
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "config"
    ]
    flags = [_flag(name) for name in LaunchConfig.model_fields]
    file = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with these flags as keys.")],
    )

    def with_configuration(config: Path | None, **values: Any) -> None:
        given = {name: values.pop(name) for name in list(values) if name in LaunchConfig.model_fields}
        command(config=load({name: value for name, value in given.items() if value is not None}, config), **values)

    with_configuration.__doc__ = command.__doc__
    with_configuration.__name__ = command.__name__
    with_configuration.__signature__ = inspect.Signature([file, *flags, *own])  # type: ignore[attr-defined]
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


@app.command("up")
@_from_flags
def up(config: LaunchConfig) -> None:
    """Check, start and watch the nodes and the proxy; Ctrl-C stops all of it."""
    plan = make_plan(config, facts.gather(config.device))
    preflight.check(config, plan)
    asyncio.run(_up(config, plan))


async def _up(config: LaunchConfig, plan: Plan) -> None:
    progress = Progress(_out)
    if config.model == TINY_MODEL and config.engine == "vllm":
        async with progress.shown():
            await setup.make_tiny_model(progress, Path(plan.nodes[0].command[0]))
    clear_run_dir(plan.run_dir)
    supervisor = Supervisor(
        plan,
        progress,
        ready_timeout_s=config.ready_timeout_s,
        stop_timeout_s=config.stop_timeout_s,
        restart=config.restart,
    )
    await supervisor.run()


@app.command("plan")
@_from_flags
def plan_command(
    config: LaunchConfig,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,  # noqa: FBT002
) -> None:
    """Show everything `up` would start, and start nothing."""
    plan = make_plan(config, facts.gather(config.device))
    if as_json:
        sys.stdout.write(plan.as_json() + "\n")
    else:
        _show(plan)


def _show(plan: Plan) -> None:
    table = Table(title=f"{plan.served_model_name} on {plan.proxy_url}", title_justify="left", box=None, pad_edge=False)
    for column in ("name", "listens on", "bind", "purpose", "devices"):
        table.add_column(column, no_wrap=True)
    for process in plan.processes:
        name, devices = process.name, ""
        if isinstance(process, NodeProcess):
            devices = ",".join(process.devices)
        for port in process.ports:
            table.add_row(name, str(port), port.bind, port.purpose, devices)
            name = devices = ""
    _out.print(table)
    for process in plan.processes:
        _out.print(f"\n[bold]{process.name}[/]  log {process.log}", highlight=False, soft_wrap=True)
        for name, value in process.environment.items():
            _out.out(f"  {name}={shlex.quote(value)}", highlight=False)
        if process.unset:
            _out.out(f"  unset {' '.join(process.unset)}", highlight=False)
        _out.out(f"  {shlex.join(process.command)}", highlight=False)
    _out.print("\nports that cannot be chosen", highlight=False)
    for line in plan.unpinned_ports:
        _out.out(f"  {line}", highlight=False)


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
        await setup.install_libraries(progress, environment.log)
        await environment.make(progress)
        if environment.device == "cpu":
            await setup.make_tiny_model(progress, environment.python)
    versions = setup.quick_versions(environment.python)
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    progress.say(f"engine environment: {environment.folder}\n  {listed}")


def main() -> None:
    """The console script."""
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
