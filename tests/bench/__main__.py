"""`make bench`: CPU of the proxy for a request and for a chunk, side by side with its peers.

    python -m tests.bench [--rounds N] [--router PATH] [--scale SHARE] [--json FILE]

Mock nodes (`mock_node.py`), a byte relay (the floor), pd-proxy, and vllm-router when `--router` names its program or
it is on the path. Every round runs every system on every load, in turn and then in reverse order; the table shows
medians over the rounds of figures and of ratios to vllm-router, with their spread. CPU is read from the process of the
proxy alone (user and system, all threads and children). Proxy on the second core, load and nodes on the first.

CPU a request and a chunk are a two-point fit: streams of few and of many chunks, the rest being equal.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.processes import ROOT, free_port, wait_until

HERE = Path(__file__).parent
PROMPT_BYTES = 2048
FEW, MANY = 2, 102
STREAMS = (32, 128, 512)


@dataclass(frozen=True)
class Nodes:
    """Ports of the mock prefill node, its bootstrap server, and the mock decode node."""

    prefill: int
    bootstrap: int
    decode: int


@dataclass(frozen=True)
class System:
    """A proxy under test."""

    name: str
    command: Sequence[str]
    port: int
    health: str | None


def systems(nodes: Nodes, router: str | None) -> list[System]:
    python = sys.executable
    relay, ours, theirs = free_port(), free_port(), free_port()
    pair = ["--prefill", f"http://127.0.0.1:{nodes.prefill}", str(nodes.bootstrap)]
    pair += ["--decode", f"http://127.0.0.1:{nodes.decode}"]
    found = [
        System("relay", [python, str(HERE / "relay.py"), str(relay), str(nodes.decode)], relay, None),
        System("pd-proxy", [python, "-P", "-m", "proxy.cli", "--port", str(ours), *pair], ours, "/health"),
    ]
    if router:
        flags = ["--vllm-pd-disaggregation", "--kv-connector", "mooncake", "--policy", "round_robin"]
        flags += ["--host", "127.0.0.1", "--port", str(theirs), "--prometheus-port", str(free_port())]
        found.append(System("vllm-router", [router, *flags, *pair], theirs, "/health"))
    return found


@contextlib.contextmanager
def running(command: Sequence[str], core: int) -> Iterator[psutil.Process]:
    """A child bound to a core."""
    bound = ["taskset", "-c", str(core % (os.cpu_count() or 1)), *command]
    child = subprocess.Popen(
        bound, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield psutil.Process(child.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def cpu_s(process: psutil.Process) -> float:
    """Of the whole tree, from its schedulers' own accounts (nanoseconds, where `times` has ticks of 10 ms)."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        for task in Path(f"/proc/{member.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def load(port: int, mode: str, clients: int, requests: int, tokens: int, prompt_bytes: int = PROMPT_BYTES) -> Any:  # noqa: PLR0913, PLR0917
    command = ["taskset", "-c", "0", sys.executable, str(HERE / "load.py"), str(port), mode]
    command += [str(number) for number in (clients, requests, tokens, prompt_bytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(result.stdout)


def measure(system: System, process: psutil.Process, *, scale: float) -> dict[str, float]:
    """One round of every load on one system."""

    def cost(*args: Any) -> tuple[float, Any]:
        before = cpu_s(process)
        figures = load(system.port, *args)
        return cpu_s(process) - before, figures

    found: dict[str, float] = {}
    load(system.port, "stream", 16, 64, FEW)  # warm
    errors = 0
    requests = int(3000 * scale)
    spent, figures = cost("whole", 16, requests, 1)
    found["µs a whole answer"] = spent / requests * 1e6
    errors += figures["errors"]
    for streams in STREAMS:
        rounds = max(1, int(1024 * scale / streams)) * streams
        few, one = cost("stream", streams, rounds, FEW)
        many, other = cost("stream", streams, rounds, MANY)
        a_chunk = (many - few) / (other["chunks"] - one["chunks"])
        found[f"µs a chunk, {streams} streams"] = a_chunk * 1e6
        found[f"µs a stream's request, {streams}"] = (few / rounds - FEW * a_chunk) * 1e6
        found[f"ms late p50, {streams}"] = other["late_p50"]
        found[f"ms late p99, {streams}"] = other["late_p99"]
        found[f"ms TTFT p50, {streams}"] = other["ttft_p50"]
        found[f"ms TTFT p99, {streams}"] = other["ttft_p99"]
        errors += one["errors"] + other["errors"]
    for size in (1, 5):
        spent, figures = cost("stream", 2, int(60 * scale) or 2, FEW, size * 1_000_000)
        found[f"ms a prompt of {size} MB"] = spent / figures["requests"] * 1e3
        errors += figures["errors"]
    found["RSS MB"] = sum(m.memory_info().rss for m in (process, *process.children(recursive=True))) / 1e6
    found["errors"] = errors
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--router", default=shutil.which("vllm-router"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests of a full run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    nodes = Nodes(free_port(), free_port(), free_port())
    mock = [sys.executable, str(HERE / "mock_node.py")]
    results: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        for ports in ((nodes.prefill, nodes.bootstrap), (nodes.decode, 0)):
            stack.enter_context(running([*mock, *map(str, ports)], 0))
        tested = systems(nodes, options.router)
        processes = {system.name: stack.enter_context(running(system.command, 1)) for system in tested}
        for system in tested:
            wait_until(lambda s=system: is_up(s), system.name)  # type: ignore[misc]
        for number in range(options.rounds):
            for system in tested if number % 2 == 0 else reversed(tested):
                started = time.monotonic()
                results.setdefault(system.name, []).append(measure(system, processes[system.name], scale=options.scale))
                print(f"round {number + 1} {system.name} {time.monotonic() - started:.0f} s", file=sys.stderr)  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    show(results)


def is_up(system: System) -> bool:
    if system.health is None:
        return True
    return httpx.get(f"http://127.0.0.1:{system.port}{system.health}").is_success


def show(results: dict[str, list[dict[str, float]]]) -> None:
    names = list(results)
    base = "vllm-router" if "vllm-router" in names else None
    head = ["", *names, *([f"pd-proxy / {base}"] if base else [])]
    rows = [head]
    for figure in results["pd-proxy"][0]:
        row = [figure, *(f"{statistics.median(r[figure] for r in results[name]):.1f}" for name in names)]
        if base:
            pairs = zip(results["pd-proxy"], results[base], strict=True)
            ratios = [ours[figure] / theirs[figure] for ours, theirs in pairs if theirs[figure]]
            row.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))  # noqa: T201


if __name__ == "__main__":
    main()
