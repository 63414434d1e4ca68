"""What commands put on the screen."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import logs as log_files
from .logs import Line
from .plan import NodeProcess, Plan
from .preflight import Finding

_AGAIN_S = 2.0


def plan(console: Console, made: Plan) -> None:
    """Every child with its ports, environment and command."""
    title = f"{made.served_model_name} on {made.proxy_url}, {made.connector} over {made.protocol}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("name", "listens on", "bind", "purpose", "devices"):
        table.add_column(column, no_wrap=True)
    for process in made.processes:
        name, devices = process.name, ""
        if isinstance(process, NodeProcess):
            devices = ",".join(process.devices)
        for port in process.ports:
            table.add_row(name, str(port), port.bind, port.purpose, devices)
            name = devices = ""
    console.print(table)
    for line in made.passed_over:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for process in made.processes:
        console.print(f"\n[bold]{process.name}[/]  log {process.log}", highlight=False, soft_wrap=True)
        for name, value in process.environment.items():
            console.out(f"  {name}={shlex.quote(value)}", highlight=False)
        if process.unset:
            console.out(f"  unset {' '.join(process.unset)}", highlight=False)
        console.out(f"  {shlex.join(process.command)}", highlight=False)
    console.print("\nports that cannot be chosen", highlight=False)
    for line in made.unpinned_ports:
        console.out(f"  {line}", highlight=False)


def finding(console: Console, found: Finding) -> None:
    """What, why, and how to mend it."""
    mark = "[red]error[/]" if found.severity == "error" else "[yellow]warning[/]"
    console.print(f"{mark} {escape(found.what)}", highlight=False, soft_wrap=True)
    for text in (found.why, found.mend):
        if text:
            console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)


def status(console: Console, found: dict[str, Any]) -> None:
    """A run's state, once."""
    console.print(_status(found))


def watched(console: Console, ask: Callable[[], dict[str, Any]]) -> None:
    """A run's state, until Ctrl-C."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_status(ask()), refresh=True)
            time.sleep(_AGAIN_S)


def _status(found: dict[str, Any]) -> Group:
    colour = {"ok": "green", "degraded": "yellow"}.get(found["health"], "red")
    head = Text.assemble(
        (found["health"], colour), f"  {found['model']} on {found['proxy_url']}  {found['phase']}, ",
        f"{_age(found['age_s'])}  {found['connector']}\n{found['run_dir']}\n"
        f"{'moved at the start: ' + found['proven'] if found['proven'] else 'no hand-off proven yet'}\n",
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for column in ("name", "state", "pid", "age", "api", "in flight", "run", "wait", "KV", "KV is", ""):
        table.add_column(column, no_wrap=column not in ("in flight", ""))
    for child in found["children"]:
        restarts = f" restarts: {child['restarts']}" if child["restarts"] else ""
        table.add_row(
            child["name"], child["state"], str(child["pid"] or ""), _age(child["age_s"]), (child["url"] or "").removeprefix("http://"),
            _number(child["in_flight"]), _number(child.get("running")), _number(child.get("waiting")),
            f"{child['kv_usage']:.1%}" if "kv_usage" in child else "", child["kv"] or "",
            escape((child["problem"] or "") + restarts),
        )  # fmt: skip
    return Group(head, table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _age(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"


async def logs(console: Console, files: Sequence[Path], tail: int | None, *, follow: bool) -> None:
    """What the logs hold, and, if asked to, what is added to them."""
    prefixes = log_files.coloured(file.stem for file in files) if len(files) > 1 else {}

    def show(line: Line) -> None:
        prefix = Text.from_markup(prefixes.get(line.log, ""))
        console.print(prefix + Text(line.text), highlight=False, soft_wrap=True)

    places = log_files.ends(files)
    for line in log_files.time_line(files) if tail is None else log_files.last_lines(files, tail):
        show(line)
    if follow:
        async for line in log_files.follow(files, places):
            show(line)
