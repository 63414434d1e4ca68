"""`make bench-routing`: which router sends prompts where they are computed soonest.

    python -m tests.bench.routing [--install] [--requests N] [--seeds 1,2] [--only NAME,…] [--json FILE]

Simulated nodes (engines/sim, with a prefix cache and an engine's time, compressed), new ones for every run, so that
caches are empty; the same requests at the same times for every system. Four prefill nodes and two decode nodes. The
load is what the prefill nodes would have to do if nothing were computed twice, as a share of what they can do.

Times are in seconds of the workload. CPU of the routers is in them: they run in real time, the nodes' time is
compressed. TTFT counts from when a request was due. Goodput: share of the requests with a TTFT of at most 5 s and a
time per output token of at most 0.1 s. Imbalance: computed tokens of the busiest prefill node to the mean. A system
whose KV does not move is no comparison: its decode nodes compute every prompt again.
"""

import argparse
import asyncio
import contextlib
import json
import math
import signal
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from engines.sim.timing import Speeds
from launcher.errors import LauncherError
from launcher.measure import load
from launcher.measure.loadgen import Planned
from launcher.measure.results import figures
from launcher.measure.slo import Slo
from tests.processes import Sim, metric, running, sim_node, wait_until

from . import peers, workloads
from .peers import System
from .workloads import Arrival

PREFILL_NODES, DECODE_NODES = 4, 2
CASES = (("chats", 0.75), ("chats", 0.9), ("trace", 0.75), ("trace", 0.9), ("hot", 0.75), ("unshared", 0.75))
REAL_RATE = 20.0
"""Requests a second, on this machine: what routers, nodes and the load's own process can do on two cores."""
CACHE_TOKENS = 1_000_000
"""Of a prefill node."""
PREFILL_S = 0.02
SLO_TTFT_S, SLO_TPOT_S = 5.0, 0.1
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One workload at one load, from one seed."""

    name: str
    load: float
    arrivals: list[Arrival]

    @property
    def compress(self) -> float:
        return REAL_RATE * workloads.mean_gap(self.arrivals)

    @property
    def token_s(self) -> float:
        """So slow that the prefill nodes are as busy as they are to be."""
        work = statistics.fmean(workloads.uncached(self.arrivals))
        return (self.load * PREFILL_NODES * workloads.mean_gap(self.arrivals) - PREFILL_S) / work

    def flags(self, role: str) -> list[str]:
        """Half a byte is a token (workloads.py), so a byte takes as long as two."""
        speeds = Speeds(
            prefill_s=PREFILL_S, prefill_token_s=2 * self.token_s, decode_s=0.03, decode_sequence_s=0.0005,
            hand_off_s=0.02, hand_off_token_s=2e-6, step_tokens=4096, compress=self.compress,
        )  # fmt: skip
        blocks = CACHE_TOKENS // workloads.BLOCK_TOKENS if role == "prefill" else 10 * CACHE_TOKENS
        cache = ["--block-size", str(workloads.BLOCK_BYTES), "--num-gpu-blocks-override", str(blocks)]
        return [*cache, "--max-model-len", "1000000", "--speeds", speeds.model_dump_json()]


@contextlib.contextmanager
def nodes(case: Case) -> Iterator[tuple[list[Sim], list[Sim]]]:
    with contextlib.ExitStack() as stack:
        started = {
            role: [stack.enter_context(sim_node(role, timeout_s=300, flags=case.flags(role))) for _ in range(number)]
            for role, number in (("prefill", PREFILL_NODES), ("decode", DECODE_NODES))
        }
        yield started["prefill"], started["decode"]


def measure(system: System, case: Case, prefills: list[Sim], decodes: list[Sim]) -> Figures:
    """All requests of a case through one system."""
    rows = asyncio.run(load.run(f"http://127.0.0.1:{system.port}", {}, _planned(case)))
    limits = Slo(SLO_TTFT_S / case.compress, SLO_TPOT_S / case.compress)
    found = figures(rows, limits)
    computed = [_tokens(node, "local_compute") for node in prefills]
    cached = sum(_tokens(node, "local_cache_hit") for node in prefills)
    moved = sum(_tokens(node, "external_kv_transfer") for node in decodes)
    again = sum(_tokens(node, "local_compute") for node in decodes)
    return {
        "hit %": 100 * cached / max(cached + sum(computed), 1),
        "KV moved %": 100 * moved / max(moved + again, 1),
        "TTFT mean": found.ttft["mean"] * case.compress,
        "p50": found.ttft["p50"] * case.compress,
        "p90": found.ttft["p90"] * case.compress,
        "p99": found.ttft["p99"] * case.compress,
        "TPOT ms": 1000 * found.tpot["mean"] * case.compress,
        "goodput %": 100 * found.good / found.requests,
        "imbalance": max(computed) / max(statistics.fmean(computed), 1),
        "as predicted %": _as_predicted(system),
        "errors": found.errors,
    }


def _planned(case: Case) -> Iterator[Planned]:
    for number, one in enumerate(case.arrivals):
        body = {
            "model": "tiny", "prompt": one.prompt(number), "max_tokens": one.output, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        yield number, one.at / case.compress, body, {} if one.session < 0 else {"x-session-id": str(one.session)}


def _as_predicted(system: System) -> float:
    """Of pd-proxy's predictions of what is cached, beside what the nodes said; NaN for a system that makes none."""
    if "proxy.cli" not in system.command:
        return math.nan
    url = f"http://127.0.0.1:{system.port}"
    right, less, more = (
        metric(url, "pd_prefix_predictions_total", outcome=one) for one in ("as-predicted", "less", "more")
    )
    return 100 * right / (right + less + more) if right + less + more else math.nan


def _tokens(node: Sim, source: str) -> float:
    """Of prompts, by where their KV came from."""
    return node.metric("vllm:prompt_tokens_by_source_total", source=source)


def run(case: Case, names: list[str]) -> dict[str, Figures]:
    """Every system on nodes of its own; one that does not answer is left out."""
    found = {}
    for name in names:
        with nodes(case) as (prefills, decodes):
            system = peers.routers([*_flags("--prefill", prefills), *_flags("--decode", decodes)])[name]
            try:
                with running(list(system.command), {}):
                    wait_until(lambda at=system.port: _answers(at), name, patience_s=40)  # type: ignore[misc]
                    found[name] = measure(system, case, prefills, decodes)
            except (AssertionError, LauncherError) as exc:
                print(f"{name} is left out: {exc}", file=sys.stderr)  # noqa: T201
                continue
        print(f"{case.name} {case.load} {name} {found[name]}", file=sys.stderr, flush=True)  # noqa: T201
    return found


def _answers(port: int) -> bool:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=10).is_success


def _flags(flag: str, nodes: list[Sim]) -> list[str]:
    found = []
    for node in nodes:
        found += [flag, node.url, *([node.bootstrap.rsplit(":", 1)[1]] if node.bootstrap else [])]
    return found


def show(name: str, load: float, rounds: list[dict[str, Figures]]) -> None:
    """One table, as Markdown: means over the seeds."""
    systems = [system for system in rounds[0] if all(system in one for one in rounds)]
    figures = list(rounds[0][systems[0]])
    print(f"\n{name}, load {load:.2f}\n\n| | " + " | ".join(figures) + " |\n|" + "---|" * (len(figures) + 1))  # noqa: T201
    for system in systems:
        means = [statistics.fmean(one[system][figure] for one in rounds) for figure in figures]
        print("| " + " | ".join([system, *(f"{mean:.2f}" if mean < 10 else f"{mean:.0f}" for mean in means)]) + " |")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.routing", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--install", action="store_true", help="put the peers into an environment of their own first")
    parser.add_argument("--requests", type=int, default=1000, help="of each workload")
    parser.add_argument("--seeds", default="11,12", help="parameters were chosen on 1 to 5")
    parser.add_argument("--only", help="systems, by name, separated by commas")
    parser.add_argument("--cases", help="like trace:0.9,chats:0.75")
    parser.add_argument("--json", type=Path, help="write every run's figures here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nodes and routers end with it
    if options.install:
        peers.install()
    names = options.only.split(",") if options.only else list(peers.routers([]))
    cases = [(c.split(":")[0], float(c.split(":")[1])) for c in options.cases.split(",")] if options.cases else CASES
    results = {}
    for name, busy in cases:
        draws = [workloads.WORKLOADS[name](options.requests, int(seed)) for seed in options.seeds.split(",")]
        rounds = [run(Case(name, busy, arrivals), names) for arrivals in draws]
        results[f"{name} {busy}"] = rounds
        show(name, busy, rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
