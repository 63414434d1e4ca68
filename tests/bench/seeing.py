"""What it costs the proxy to be seen: `python -m tests.bench.seeing [--rounds N] [--before FOLDER]`.

The same load on pd-proxy as it is by default, with its admin listener (which keeps the last requests), with a page
open, and with traces that a collector takes; `--before`: on another version of this project, too. Nodes are mocks. CPU
is the proxy process', in each round as a ratio to that of the proxy as it is by default.
"""

import argparse
import contextlib
import statistics
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.otlp import HTTP, collector
from tests.processes import free_port, wait_until

from . import peers
from .__main__ import FEW, Target, load, running
from .peers import HERE, Nodes

STREAMS, TOKENS = 1000, 60
ANSWERS = 3000
_BASE = "by default"
_QUIET_S = 60


@dataclass
class Case:
    """One way to run it."""

    name: str
    flags: list[str] = field(default_factory=list)
    page: str = ""
    env: dict[str, str] = field(default_factory=dict)


def cases(sink: str, before: Path | None) -> list[Case]:
    admin, page = free_port(), free_port()
    found = [
        Case(_BASE),
        Case("with the admin listener", ["--admin-port", str(admin)]),
        Case("with a page open", ["--admin-port", str(page)], f"http://127.0.0.1:{page}/events"),
        Case("with traces", ["--otlp-traces-endpoint", sink], env=HTTP),
    ]
    if before is not None:
        found.append(Case("before", env={"PYTHONPATH": str(before)}))
    return found


@contextlib.contextmanager
def looked_at(page: str) -> Iterator[None]:
    """As an open page does: it reads all that comes."""
    if not page:
        yield
        return
    over = threading.Event()

    def read() -> None:
        with httpx.stream("GET", page, timeout=_QUIET_S) as answer:
            for _ in answer.iter_bytes():
                if over.is_set():
                    return

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    try:
        yield
    finally:
        over.set()
        reading.join(10)


def measure(target: Target, page: str) -> dict[str, float]:
    with looked_at(page):
        load(target.port, "whole", 16, 100, 1)  # warm
        before = target.cpu_s()
        load(target.port, "whole", 16, ANSWERS, 1)
        whole = target.cpu_s()
        figures = load(target.port, "stream", STREAMS, STREAMS, TOKENS)
        streams = target.cpu_s()
        load(target.port, "stream", 16, 10 * STREAMS // 16, FEW)
        if figures["errors"]:
            raise AssertionError(f"{figures['errors']} errors")
    return {
        "a whole answer, µs": (whole - before) / ANSWERS * 1e6,
        f"{STREAMS} streams of {TOKENS} chunks at once, s": streams - whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.seeing", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    options = parser.parse_args()
    nodes = Nodes(free_port(), free_port(), free_port())
    results: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(collector())
        for ports in ((nodes.prefill, nodes.bootstrap), (nodes.decode, 0)):
            stack.enter_context(running([sys.executable, str(HERE / "mock_node.py"), *map(str, ports)], 0))
        targets = []
        for case in cases(sink.url, options.before):
            system = peers.ours(nodes, case.flags)
            env = [f"{name}={value}" for name, value in case.env.items()]
            process = stack.enter_context(running(["env", *env, *system.command], 1))
            target = Target(system, process)
            wait_until(target.is_up, case.name)
            targets.append((case, target))
        for number in range(options.rounds):
            for case, target in targets if number % 2 == 0 else reversed(targets):
                results.setdefault(case.name, []).append(measure(target, case.page))
                print(f"round {number + 1}, {case.name}: {results[case.name][-1]}", file=sys.stderr)  # noqa: T201
    show(results)


def show(results: dict[str, list[dict[str, float]]]) -> None:
    names = list(results)
    print("| CPU of the proxy | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))  # noqa: T201
    for figure in results[_BASE][0]:
        row = [figure]
        for name in names:
            pairs = zip(results[name], results[_BASE], strict=True)
            ratios = [one[figure] / base[figure] for one, base in pairs]
            middle = statistics.median(found[figure] for found in results[name])
            spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if name != _BASE else ""
            ratio = "" if name == _BASE else f": {statistics.median(ratios):.2f}{spread}"
            row.append(f"{middle:.3g}{ratio}")
        print("| " + " | ".join(row) + " |")  # noqa: T201


if __name__ == "__main__":
    main()
