"""What commands put on the screen: 80 columns hold all that matters, and problems are lines of their own."""

import re
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engines.base import NodeRole

from ..check.findings import Checked, Finding
from ..inspect import logs as log_files
from ..inspect.logs import Line
from ..inspect.runs import RunState
from ..plan.facts import HostFacts, rdma_problem
from ..plan.plan import NodeProcess, Plan

if TYPE_CHECKING:
    from ..inspect.status import ChildStatus, Status

_AGAIN_S = 2.0
_LOOK_EVERY_S = 0.25
_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


# -- plan, check, facts


def plan(console: Console, made: Plan, *, verbose: bool) -> None:
    """In a few lines; with `verbose` every child with its environment and command."""
    counts = ((role, len(made.of_kind(role))) for role in NodeRole)
    nodes = ", ".join(f"{number} {role}" for role, number in counts if number)
    _line(console, f"{', '.join(made.served_names)} on {made.proxy_url}, page on {made.admin_url}")
    _line(
        console,
        f"{nodes}: {made.engine} on {made.device}",
    )
    over = "no KV connector" if made.connector == "none" else f"{made.connector} over {made.protocol}"
    _line(console, f"{over}: {made.protocol_why}")
    if made.download is not None:
        _line(console, f"model {made.download.model}: fetched first, if it is not in the cache")
    table = _table("\nname", "\napi", "\nbootstrap", "\ntransfer", "\nGPUs", "\nTP·PP·DP")
    for process in made.processes:
        ports = {port.purpose: str(port) for port in process.ports}
        node = process if isinstance(process, NodeProcess) else None
        sizes = f"{node.seat.tensor}·{node.seat.pipeline}·{node.seat.data}" if node else ""
        single = ports.get("api") or ports.get("proxy") or ports.get("store", "")
        table.add_row(
            process.name, single, ports.get("bootstrap", ""), ports.get("transfer", ""),
            ",".join(node.devices) if node else "", sizes,
        )  # fmt: skip
    console.print(table)
    _line(console, f"\nlogs {made.run_dir}")
    for line in made.passed_over:
        _line(console, line)
    if verbose:
        _commands(console, made)
    else:
        _line(console, "commands and environment: -v, --json, --shell")


def _commands(console: Console, made: Plan) -> None:
    for process in made.processes:
        console.print(f"\n[bold]{process.name}[/]  log {process.log}", highlight=False, soft_wrap=True)
        for port in process.ports:
            _line(console, f"  listens on {port.bind} {port} ({port.purpose})")
        for name, value in process.environment.items():
            console.out(f"  {name}={shlex.quote(value)}", highlight=False)
        if process.inherited:
            _line(console, f"  inherits {' '.join(process.inherited)}")
        console.out(f"  {shlex.join(process.command)}", highlight=False)
    _line(console, "\nports that cannot be chosen")
    for text in made.unpinned_ports:
        _line(console, f"  {text}")


def checked(console: Console, found: Sequence[Checked]) -> None:
    """What was looked at, and of each finding what, why, and how to fix it."""
    for one in found:
        console.print(f"{_MARKS[one.worst]} {one.theme:<12} {escape(one.looked_at)}", highlight=False, soft_wrap=True)
        for finding in one.findings:
            mark = "[red]error[/]" if finding.severity == "error" else "[yellow]warning[/]"
            text = escape(finding_text(finding)).replace("\n", "\n    ")
            console.print(f"    {mark} {text}", highlight=False, soft_wrap=True)
    findings = [finding for one in found for finding in one.findings]
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    _line(console, f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}")


def finding_text(finding: Finding) -> str:
    return "\n".join(text for text in (finding.what, finding.why, finding.fix) if text)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def facts(console: Console, found: HostFacts) -> None:
    """In a few lines."""
    gpus = "\n".join(
        f"  {gpu.number}  {gpu.name}  {gpu.free_mib // 1024} of {gpu.memory_mib // 1024} GiB free"
        + ("" if gpu.numa_node is None else f"  NUMA {gpu.numa_node}")
        for gpu in found.gpus
    )
    adapters = ", ".join(adapter.name for adapter in found.rdma) or "none"
    kept = "unlimited" if found.locked_memory_kib is None else f"{found.locked_memory_kib} KiB"
    lines = (
        f"host      {found.name} ({found.resolves_to or 'its name resolves to no address'})",
        f"memory    {found.memory_available_mib / 1024:.1f} GiB available, /dev/shm {found.shared_memory_free_mib} MiB",
        f"limits    {found.open_files or 'unlimited'} files, locked memory {kept}",
        f"GPUs      {len(found.gpus) or found.gpu_problem}" + (f", driver {found.driver}" if found.driver else ""),
        *([gpus] if gpus else []),
        f"RDMA      {adapters}: {rdma_problem(found) or 'can be used'}",
        f"ephemeral {found.ephemeral_ports[0]}-{found.ephemeral_ports[1]}",
        f"taken     {', '.join(map(str, sorted(found.taken)[:8])) or 'no port of the ranges'}"
        + (" ..." if len(found.taken) > 8 else ""),
        f"engine    {found.engine.problem or found.engine.python}",
        *(f"          {name} {version}" for name, version in sorted(found.engine.versions.items())),
    )
    for line in lines:
        _line(console, line)


# -- runs


def listed(console: Console, found: Sequence[tuple[str, str, RunState]]) -> None:
    """One run a line."""
    if not found:
        _line(console, "No runs are known here.")
        return
    table = _table("state", "began", "model", "proxy")
    table.add_column("run folder", overflow="fold")
    for folder, phase, state in found:
        began = datetime.fromtimestamp(state.began).astimezone().strftime("%m-%d %H:%M")
        table.add_row(phase, began, state.model, state.proxy_url.removeprefix("http://"), folder)
    console.print(table)


def status(console: Console, found: "Status", *, verbose: bool) -> None:
    """A run's state, once."""
    console.print(_status(found, verbose=verbose), soft_wrap=True)


def watched(console: Console, ask: Callable[[], "Status"], *, verbose: bool) -> None:
    """A run's state, until Ctrl-C."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_status(ask(), verbose=verbose), refresh=True)
            time.sleep(_AGAIN_S)


def _status(found: "Status", *, verbose: bool) -> Group:
    colour = {"ok": "green", "degraded": "yellow"}.get(found.health, "red")
    elsewhere = f" on {found.host}, where it can be asked for" if found.phase == "elsewhere" else ""
    head = Text.assemble(
        (found.health, colour),
        f"  {found.model} on {found.proxy_url}  {found.phase}{elsewhere}, {_age(found.age_s)}\n",
        f"{found.run_dir}\n",
        f"page {found.page}\n" if found.phase == "ready" else "",
        _proof_in_words(found),
        _lately(found.proxy),
    )  # fmt: skip
    table = _table("name", "state", "age", "requests", "KV use", "held", "tokens/s", "KV moves")
    for child in found.children:
        table.add_row(
            child.name, child.state, _age(child.age_s), _requests(child),
            "" if child.kv_usage is None else f"{child.kv_usage:.1%}", "" if child.held is None else str(child.held),
            "" if child.tokens_a_second is None else f"{child.tokens_a_second:.0f}", child.kv or "",
        )  # fmt: skip
    lines: list[RenderableType] = [Text(line) for child in found.children for line in _told_of(child, verbose=verbose)]
    lines += [Text(f"{one.prefill} → {one.decode}: {one.a_second:g} hand-offs/s") for one in found.pairs]
    return Group(head, table, *lines)


def _lately(proxy: Mapping[str, float | None]) -> str:
    """The proxy's figures; nothing when it does not tell them."""
    if not proxy:
        return ""
    waits = {name: proxy.get(f"ttft_{name}_s") for name in ("p50", "p99")}
    ttft = ", ".join(f"{wait_s * 1000:.0f} ms {name}" for name, wait_s in waits.items() if wait_s is not None)
    return (
        f"{proxy['in_flight']:g} in flight, {proxy['queued']:g} queued; last minute: {proxy['requests_a_second']:g} "
        f"requests/s, {proxy['failed']:g} failed{f', TTFT {ttft}' if ttft else ''}\n"
    )


def _proof_in_words(found: "Status") -> str:
    if found.proven:
        return f"KV moved at the start: {found.proven}\n"
    return "no KV connector: nothing is handed over\n" if found.connector == "none" else "no hand-off proven yet\n"


def _requests(child: "ChildStatus") -> str:
    """Running and waiting, as the node says; those the proxy has there, when it does not answer."""
    if child.running is not None:
        waiting = f"+{child.waiting:g}" if child.waiting else ""
        return f"{child.running:g}{waiting}"
    return "" if child.in_flight is None else f"({child.in_flight})"


def _told_of(child: "ChildStatus", *, verbose: bool) -> Iterable[str]:
    if child.problem:
        yield f"{child.name}: {child.problem}"
    if child.error:
        yield f"{child.name}: last error: {child.error}"
    if child.restarts:
        last = f", last: {child.deaths[-1].how}" if child.deaths else ""
        yield f"{child.name}: started again {child.restarts} times{last}"
    if verbose:
        yield f"{child.name}: pid {child.pid or '-'}  {child.url or ''}  {', '.join(child.ports)}  log {child.log}"
        for death in child.deaths:
            at = datetime.fromtimestamp(death.at).astimezone().strftime("%m-%d %H:%M:%S")
            yield f"{child.name}: ended {at}, {death.how}"


def _age(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (
        f"{days}d{hours}h"
        if days
        else f"{hours}h{minutes}m"
        if hours
        else f"{minutes}m{left}s"
        if minutes
        else f"{left}s"
    )


# -- logs


@dataclass(frozen=True, slots=True)
class Shown:
    """Which lines of logs."""

    last: int | None = None
    since: float | None = None
    """Seconds since 1970."""
    pattern: re.Pattern[str] | None = None


async def logs(
    console: Console, files: Sequence[Path], later: Callable[[], Sequence[Path]] | None, shown: Shown
) -> None:
    """What the logs hold, and, with `later` (which files there are by then), what is added to them."""
    places = log_files.ends(files)
    tell = _teller(console, [file.stem for file in files])
    for line in _held(files, places if later is not None else {}, shown):
        tell(line)
    if later is not None:
        async for line in log_files.follow(later, places):
            if shown.pattern is None or shown.pattern.search(line.text):
                tell(line)


def followed(console: Console, files: Callable[[], Sequence[Path]], over: threading.Event) -> None:
    """What is added to logs, those that come later included, until it is over and all of it was shown."""
    tell, places, numbers = _teller(console, []), {}, {}  # type: ignore[var-annotated]
    while True:
        is_last = over.wait(_LOOK_EVERY_S)
        for line in log_files.added(files(), places, numbers):
            tell(line)
        if is_last:
            return


def _held(files: Sequence[Path], until: Mapping[Path, int], shown: Shown) -> Iterable[Line]:
    if shown.since is None and shown.pattern is None:
        if shown.last is None:
            return log_files.time_line(files, until)
        return log_files.last_lines(files, shown.last, until)
    since = shown.since if shown.since is not None else float("-inf")
    found = log_files.wanted(log_files.time_line(files, until), since, shown.pattern)
    return found if shown.last is None else deque(found, shown.last)


def _teller(console: Console, names: Sequence[str]) -> Callable[[Line], None]:
    """Each line with its log's name before it, where there are several."""
    prefixes = log_files.coloured(names)

    def tell(line: Line) -> None:
        if line.log not in prefixes:
            prefixes.update(log_files.coloured([*prefixes, line.log]))
        prefix = Text.from_markup(prefixes[line.log]) if len(names) != 1 else Text()
        console.print(prefix + Text(line.text), highlight=False, soft_wrap=True)

    return tell
