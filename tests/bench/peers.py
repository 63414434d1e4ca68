"""The proxies that are measured, and where the others come from.

Peers are installed in an environment of their own (`--install`), from PyPI, pinned; vLLM's example proxy is no
package and is named by its path (`--example`).
"""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import free_port

HERE = Path(__file__).parent
PINNED = ("vllm-router==0.1.17", "smg==1.13.0")
ENVIRONMENT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pd-launch" / "bench-peers"


@dataclass(frozen=True)
class Nodes:
    """Ports of the mock prefill node, its bootstrap server, and the mock decode node."""

    prefill: int
    bootstrap: int
    decode: int

    @property
    def urls(self) -> list[str]:
        """The flags that all of these proxies share."""
        prefill = ["--prefill", f"http://127.0.0.1:{self.prefill}", str(self.bootstrap)]
        return [*prefill, "--decode", f"http://127.0.0.1:{self.decode}"]


@dataclass(frozen=True)
class System:
    """Something that load is put on. Without a command it is the decode node itself: the floor of every latency."""

    name: str
    command: Sequence[str]
    port: int


def install() -> None:
    """Idempotent; raises CalledProcessError."""
    if not (ENVIRONMENT / "bin" / "python").exists():
        venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "-q", *PINNED], check=True)


def ours(nodes: Nodes, flags: Sequence[str] = ()) -> System:
    port = free_port()
    return System("pd-proxy", [sys.executable, "-P", "-m", "proxy.cli", "--port", str(port), *flags, *nodes.urls], port)


def systems(nodes: Nodes, example: Path | None) -> list[System]:
    """The floor, a byte relay, pd-proxy, and every peer that is there."""
    python = sys.executable
    relay = free_port()
    found = [
        System("direct", [], nodes.decode),
        System("relay", [python, str(HERE / "relay.py"), str(relay), str(nodes.decode)], relay),
        ours(nodes),
    ]
    if (router := ENVIRONMENT / "bin" / "vllm-router").exists():
        mode = ["--vllm-pd-disaggregation", "--kv-connector", "mooncake", "--policy", "round_robin"]
        found.append(_peer("vllm-router", [str(router), *mode], nodes.urls))
    if (gateway := ENVIRONMENT / "bin" / "smg").exists():
        mode = ["launch", "--pd-disaggregation", "--backend", "vllm", "--policy", "round_robin"]
        found.append(_peer("smg", [str(gateway), *mode], nodes.urls))
    if example is not None:
        port = free_port()
        command = [python, str(example), "--host", "127.0.0.1", "--port", str(port), *nodes.urls]
        found.append(System("example", command, port))
    return found


def routers(urls: Sequence[str]) -> dict[str, System]:
    """Every policy worth comparing, by name: pd-proxy's own, and those of the peers that are there."""
    found = {}
    for policy in ("prefix-cost", "least-load", "round-robin"):
        port = free_port()
        program = [sys.executable, "-P", "-m", "proxy.cli", "--port", str(port), "--prefill-policy", policy]
        found[f"pd-proxy {policy}"] = System(policy, [*program, *urls], port)
    port = free_port()
    four = [sys.executable, "-P", "-m", "proxy.cli", "--port", str(port), "--workers", "4"]
    found["pd-proxy 4 workers"] = System("4 workers", [*four, *urls], port)
    if (router := ENVIRONMENT / "bin" / "vllm-router").exists():
        for policy in ("cache_aware", "power_of_two", "round_robin", "consistent_hash", "kv_aware"):
            mode = ["--vllm-pd-disaggregation", "--kv-connector", "mooncake", "--policy", policy]
            found[f"vllm-router {policy}"] = _peer(policy, [str(router), *mode], urls)
    if (gateway := ENVIRONMENT / "bin" / "smg").exists():
        mode = ["launch", "--pd-disaggregation", "--backend", "vllm", "--policy", "cache_aware"]
        found["smg cache_aware"] = _peer("smg", [str(gateway), *mode], urls)
    return found


def _peer(name: str, command: list[str], urls: Sequence[str]) -> System:
    port = free_port()
    listening = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    return System(name, [*command, *listening, *urls], port)
