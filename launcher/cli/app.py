"""`pd-launch`: the table of its commands. Errors become one line and an exit code here, and nowhere else.

What a command needs is imported when it is known which one: a command in a loop costs what it does, and no more.
"""

import io
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import packages_distributions, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from engines.base import foreign_owners

from ..errors import ConfigError, LauncherError

COMMANDS: dict[str, tuple[str, str]] = {
    "setup": ("setting_up", "Make the engine's environment (vLLM and Mooncake), and see that it works."),
    "facts": ("starting", "What this host is like, as plans and checks see it."),
    "plan": ("starting", "Show everything `up` would start, and start nothing."),
    "check": ("starting", "Check everything that `up` checks, and start nothing."),
    "test": ("starting", "Try it in stages: transfer engine, each node, addresses, one hand-off."),
    "up": ("starting", "Check, start and watch the nodes and the proxy; Ctrl-C stops all of it."),
    "compare": ("comparing", "The same requests for different nodes on the same devices: which serves more in time?"),
    "size": ("sizing", "Measure a prefill and a decode node, and say how many of each some requests need."),
    "ls": ("running", "All runs that are known here."),
    "status": ("running", "Nodes, ports, health, load and the proof that KV moves."),
    "logs": ("running", "All nodes' logs in one time line, or some nodes' only."),
    "trace": ("running", "One request by stages: nodes, attempts, times, what went wrong, and its log lines."),
    "doctor": ("running", "Read all nodes' logs: what failed first, on which node, why, how to fix it."),
    "restart": ("running", "Drain one node (or the proxy), stop it and start it again."),
    "scale": ("running", "Start further nodes, or drain and stop the last ones."),
    "stop": ("running", "Stop a run, as Ctrl-C would."),
    "clean": ("running", "End what runs left behind whose launcher was killed."),
}
"""Name -> the module it is in, and what it does."""


class _Commands(TyperGroup):
    """Loads a command when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        del ctx
        return command_named(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def command_named(name: str) -> Any:
    """The command, ready to run."""
    from .flags import GroupedCommand  # noqa: PLC0415  see above

    module = import_module(f".{COMMANDS[name][0]}", __package__)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(name, cls=GroupedCommand)(getattr(module, name))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they would print the values of local variables, secrets among them
)


def _tell_version(wanted: bool) -> None:  # noqa: FBT001  as typer calls it
    if wanted:
        sys.stdout.write(f"pd-launch {version('pd-launch')}\n")
        raise typer.Exit


@app.callback()
def _about(
    _version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True)] = False,  # noqa: FBT002
) -> None:
    """Plan, check, start and watch prefill/decode-disaggregated vLLM nodes with the Mooncake transfer engine."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 0, or the code of what went wrong (`errors.py`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a screen that knows no ✓ ends no run
    try:
        others = foreign_owners(packages_distributions())
        if others:
            raise ConfigError(f"these installed packages take our names: {others}", "Use an environment of its own")
        app(args=list(arguments) if arguments is not None else None)
    except LauncherError as exc:
        _tell_error(exc)
        raise SystemExit(exc.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _tell_error(error: LauncherError) -> None:
    from rich.markup import escape  # noqa: PLC0415  see above

    from .output import err  # noqa: PLC0415

    err.print(f"[red]pd-launch:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(error.hint, highlight=False, soft_wrap=True, markup=False)
