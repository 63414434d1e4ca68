"""`make bench`: what a proxy costs, side by side with its peers.

    python -m tests.bench [--install] [--example PATH] [--rounds N] [--scale SHARE] [--json FILE] [--chart FILE]

Mock nodes (`mock_node.py`), the decode node asked directly (the floor of every latency), a byte relay (the floor of
this event loop), pd-proxy, and the peers that are there (`peers.py`). Every round puts every load on every system, in
turn and then in reverse order; the table shows medians over the rounds, and of their ratios to vllm-router with the
spread. CPU is read from the process of the proxy alone (user and system, all threads and children). Proxies run on the
second core, load and nodes on the first.

CPU a request and a chunk are a two-point fit: streams of few and of many chunks, the rest being equal.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.processes import ROOT, free_port, wait_until

from . import peers
from .peers import HERE, Nodes, System

PROMPT_BYTES = 2048
FEW, MANY = 2, 102
STREAMS = (32, 128, 512)
CROWD = 2000
BASE = "vllm-router"

Figures = dict[str, float]


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


class Target:
    """A system with its process, if it has one of its own."""

    def __init__(self, system: System, process: psutil.Process | None) -> None:
        self.name = system.name
        self.port = system.port
        self._process = process

    def is_up(self) -> bool:
        body = {"model": "tiny", "max_tokens": 1, "stream": True, "messages": [{"role": "user", "content": "x"}]}
        answer = httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=5)
        return answer.is_success and "data:" in answer.text

    def cpu_s(self) -> float:
        """Of the whole tree, from its schedulers' own accounts (nanoseconds, where `times` has ticks of 10 ms)."""
        total = 0
        for member in self._members():
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{member.pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def rss_mb(self) -> float:
        return sum(member.memory_info().rss for member in self._members()) / 1e6

    def _members(self) -> list[psutil.Process]:
        return [] if self._process is None else [self._process, *self._process.children(recursive=True)]


def load(port: int, mode: str, clients: int, requests: int, tokens: int, prompt_bytes: int = PROMPT_BYTES) -> Any:  # noqa: PLR0913, PLR0917
    command = [*_loading(port, mode, clients, requests, tokens), str(prompt_bytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(result.stdout)


def _loading(port: int, mode: str, clients: int, requests: int, tokens: int) -> list[str]:
    program = ["taskset", "-c", "0", sys.executable, str(HERE / "load.py"), str(port), mode]
    return [*program, *(str(number) for number in (clients, requests, tokens))]


def measure(target: Target, scale: float) -> Figures:
    """One round of every load on one system."""
    found: Figures = {}
    errors = 0

    def cost(*args: Any) -> tuple[float, Any]:
        nonlocal errors
        before = target.cpu_s()
        figures = load(target.port, *args)
        errors += figures["errors"]
        return target.cpu_s() - before, figures

    cost("stream", 16, 64, FEW)  # warm
    requests = int(3000 * scale)
    spent, _ = cost("whole", 16, requests, 1)
    found["µs a whole answer"] = spent / requests * 1e6
    for streams in STREAMS:
        rounds = max(1, int(1024 * scale / streams)) * streams
        few, one = cost("stream", streams, rounds, FEW)
        many, other = cost("stream", streams, rounds, MANY)
        a_chunk = (many - few) / (other["chunks"] - one["chunks"])
        found[f"µs a chunk, {streams} streams"] = a_chunk * 1e6
        found[f"µs a stream's request, {streams}"] = (few / rounds - FEW * a_chunk) * 1e6
        for figure, word in (("ttft", "TTFT"), ("late", "chunk late")):
            for share in ("p50", "p99"):
                found[f"ms {word} {share}, {streams}"] = other[f"{figure}_{share}"]
    found["answers a second, 256 clients"] = _throughput(target, int(6000 * scale))
    found[f"RSS MB, {CROWD} streams"], crowd_errors = _crowd(target)
    for size in (1, 5):
        times = max(4, int(40 * scale / size))
        spent, _ = cost("whole", 2, times, 1, size * 2**20)
        found[f"ms a prompt of {size} MB"] = spent / times * 1e3
    found["errors"] = errors + crowd_errors
    return found


def _throughput(target: Target, requests: int) -> float:
    figures = load(target.port, "whole", 256, requests, 1)
    return float(figures["requests"] / figures["seconds"])


def _crowd(target: Target) -> tuple[float, int]:
    """The largest memory seen while so many streams run at once, and how many of them failed."""
    most = 0.0
    command = [*_loading(target.port, "stream", CROWD, CROWD, 200), str(PROMPT_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        while child.poll() is None:
            most = max(most, target.rss_mb())
            time.sleep(0.2)
        assert child.stdout is not None
        figures = json.loads(child.stdout.read())
    return most, figures["errors"] + CROWD - figures["requests"]


def refusals(served: float, nodes: Nodes, scale: float) -> None:
    """Print what it costs us to refuse, as a share of a served whole answer: without a key, and when it is full."""
    requests = int(3000 * scale)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text("key")
        cases = {"401": ["--api-keys-file", str(keys)], "429": ["--max-in-flight", "1", "--max-queue", "0"]}
        for status, flags in cases.items():
            system = peers.ours(nodes, flags)
            with running(system.command, 1) as process, contextlib.ExitStack() as stack:
                target = Target(system, process)
                wait_until(lambda url=f"http://127.0.0.1:{system.port}/readyz": httpx.get(url).is_success, "pd-proxy")  # type: ignore[misc]
                if status == "429":  # one stream has the only place
                    held = _loading(system.port, "stream", 1, 1, 100_000)
                    child = stack.enter_context(subprocess.Popen([*held, str(PROMPT_BYTES)]))
                    stack.callback(child.kill)
                    time.sleep(1)
                before, began = target.cpu_s(), time.monotonic()
                if status == "429":
                    time.sleep(2)
                idle = (target.cpu_s() - before) / (time.monotonic() - began)
                before, began = target.cpu_s(), time.monotonic()
                figures = load(system.port, "whole", 16, requests, 1)
                spent = target.cpu_s() - before - idle * (time.monotonic() - began)
            if figures["errors"] != requests:
                raise AssertionError(f"{requests - figures['errors']} of {requests} were not refused")
            cost = spent / requests * 1e6
            print(f"a {status}: {cost:.0f} µs, {cost / served:.2f} of a served answer")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--install", action="store_true", help="put the peers into an environment of their own first")
    parser.add_argument("--example", type=Path, metavar="PATH", help="vLLM's example proxy, to be measured too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests of a full run")
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    parser.add_argument("--chart", type=Path, help="write a PNG here")
    options = parser.parse_args()
    if options.install:
        peers.install()
    results = run(options.rounds, options.scale, options.example)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    show(results)
    if options.chart:
        from .chart import draw  # noqa: PLC0415  its library is needed for nothing else

        draw(results, options.chart)


def run(rounds: int, scale: float, example: Path | None) -> dict[str, list[Figures]]:
    nodes = Nodes(free_port(), free_port(), free_port())
    mock = [sys.executable, str(HERE / "mock_node.py")]
    results: dict[str, list[Figures]] = {}
    with contextlib.ExitStack() as stack:
        for ports in ((nodes.prefill, nodes.bootstrap), (nodes.decode, 0)):
            stack.enter_context(running([*mock, *map(str, ports)], 0))
        targets = []
        for system in peers.systems(nodes, example):
            process = stack.enter_context(running(system.command, 1)) if system.command else None
            target = Target(system, process)
            try:
                wait_until(target.is_up, system.name, patience_s=30)
            except AssertionError:
                print(f"{system.name} does not answer, and is left out", file=sys.stderr)  # noqa: T201
                continue
            targets.append(target)
        for number in range(rounds):
            for target in targets if number % 2 == 0 else reversed(targets):
                started = time.monotonic()
                results.setdefault(target.name, []).append(measure(target, scale))
                print(f"round {number + 1} {target.name} {time.monotonic() - started:.0f} s", file=sys.stderr)  # noqa: T201
        served = statistics.median(found["µs a whole answer"] for found in results["pd-proxy"])
        refusals(served, nodes, scale)
    return results


def show(results: dict[str, list[Figures]]) -> None:
    """The table, as Markdown."""
    names = list(results)
    head = ["", *names, *([f"pd-proxy / {BASE}"] if BASE in names else [])]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))  # noqa: T201
    for figure in results["pd-proxy"][0]:
        row = [figure, *(_median(results[name], figure) for name in names)]
        if BASE in names:
            row.append(ratio(results, figure))
        print("| " + " | ".join(row) + " |")  # noqa: T201


def _median(rounds: list[Figures], figure: str) -> str:
    middle = statistics.median(found[figure] for found in rounds)
    return f"{middle:.0f}" if middle >= 100 else f"{middle:.1f}"


def ratio(results: dict[str, list[Figures]], figure: str) -> str:
    """Ours to the base's, round by round: median (lowest-highest)."""
    pairs = zip(results["pd-proxy"], results[BASE], strict=True)
    ratios = [ours[figure] / theirs[figure] for ours, theirs in pairs if theirs[figure]]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""


if __name__ == "__main__":
    main()
