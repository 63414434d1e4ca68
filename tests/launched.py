"""`pd-launch up` as a user starts it: a process whose output is read until it says "Ready"."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from launcher.cli.app import main
from tests.processes import ROOT, free_port, free_range, http, metric, wait_until

PD_LAUNCH = (sys.executable, "-P", "-m", "launcher.cli")
STOP_PATIENCE_S = 120
RESTART_PATIENCE_S = 600


@dataclass
class Up:
    """A `pd-launch up`, its output so far, and what it started."""

    process: "subprocess.Popen[str]"
    run_dir: Path
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def nodes(self, role: str) -> list[str]:
        """URLs of the nodes of a role, from the topology file."""
        topology = json.loads((self.run_dir / "topology.json").read_text())
        return [node["url"] for node in topology["nodes"] if node["role"] == role]

    def until(self, text: str, patience_s: float) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None, text, patience_s)
        assert text in self.output, self.output

    def status(self) -> dict[str, Any]:
        """As `pd-launch status --json` has it."""
        told = at_once("status", "--json", "--run-dir", str(self.run_dir)).stdout
        found: dict[str, Any] = json.loads(told)
        return found

    @property
    def temporary(self) -> Path:
        """The folder of its sockets and the like."""
        return Path(json.loads((self.run_dir / "state.json").read_text())["temporary"])

    def kv_in_use(self) -> float:
        """Summed over all nodes: the shares of KV blocks that are in use or held for a hand-off."""
        urls = [url for role in ("prefill", "decode", "both") for url in self.nodes(role)]
        return sum(metric(url, "vllm:kv_cache_usage_perc") for url in urls)

    def health(self) -> dict[str, Any]:
        """What the proxy's /health says of each node, by its name."""
        return {node["name"]: node for node in http.get(f"{self.url}/health", timeout=30).json()["nodes"]}

    def until_well(self) -> None:
        everyone = "all nodes to be used again"
        wait_until(lambda: all(node["usable"] for node in self.health().values()), everyone, RESTART_PATIENCE_S)

    def child(self, name: str) -> psutil.Process:
        """A node's own process, or the proxy's."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.environ().get("PD_LAUNCH_NODE") == name)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGINT) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_PATIENCE_S)


class Page:
    """The admin listener of a run."""

    def __init__(self, run_dir: Path) -> None:
        state = json.loads((run_dir / "state.json").read_text())
        self.url = str(state["admin_url"])
        self.key = str(state["admin_key"])

    @property
    def address(self) -> str:
        """As it is printed for a browser."""
        return f"{self.url}/#key={self.key}"

    def ask(self, method: str, path: str) -> httpx.Response:
        return http.request(method, f"{self.url}{path}", headers={"authorization": f"Bearer {self.key}"})

    def node(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(one for one in self.ask("GET", "/state").json()["nodes"] if one["name"] == name)
        return found


def own_ports(nodes: int) -> list[str]:
    """Flags that keep a run clear of every other on this machine."""
    return [
        "--http-ports", free_range(nodes), "--bootstrap-ports", free_range(nodes),
        "--transfer-ports", free_range(16 * nodes), "--admin-ports", free_range(1), "--proxy-port", str(free_port()),
    ]  # fmt: skip


@contextmanager
def up(tmp_path: Path, *flags: str, nodes: int = 2, env: Mapping[str, str] | None = None) -> Iterator[Up]:
    """Start it; whatever the test did, nothing of it is left afterwards."""
    ports = own_ports(nodes)
    command = [*PD_LAUNCH, "up", "--run-dir", str(tmp_path / "run"), *ports, *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "XDG_STATE_HOME": str(tmp_path / "state"), **(env or {})},
    )  # fmt: skip
    run = Up(process, tmp_path / "run", f"http://127.0.0.1:{ports[-1]}")
    reader = threading.Thread(target=_read, args=(run,), daemon=True)
    reader.start()
    try:
        yield run
    finally:
        if process.poll() is None:
            run.end()
        reader.join(STOP_PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def run_to_end(command: Sequence[str], patience_s: float = 120) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*PD_LAUNCH, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=patience_s
    )


def at_once(*command: str) -> "subprocess.CompletedProcess[str]":
    """A command that starts nothing, in this very process: half a second less than an interpreter of its own."""
    output, errors = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    code: Any = 0
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            main(command)
    except SystemExit as exc:
        code = exc.code or 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())


def _read(run: Up) -> None:
    assert run.process.stdout is not None
    for line in run.process.stdout:
        run.lines.append(line)
