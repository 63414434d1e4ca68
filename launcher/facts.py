"""What the plan needs to know of this host. Gathered once; a test makes up its own."""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

import engines.plugins
from engines.vllm.command import Device

APPLICATION = "pd-launch"
_LONGEST_TEMPORARY = 30


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Of the machine, its environment and what is installed."""

    has_rdma: bool
    our_python: str
    engine_python: str
    """The environment `pd-launch setup` makes for the device asked for."""
    tiny_model: Path
    plugins: Path
    """Folder of the modules an engine loads."""
    new_run_dir: Path
    temporary: Path
    no_proxy: tuple[str, ...] = ()
    """What the user has in NO_PROXY."""
    taken: Mapping[int, str] = field(default_factory=dict)
    """Ports that cannot be had, and who has them, in words."""


def gather(device: Device) -> HostFacts:
    from . import setup  # noqa: PLC0415  setup's own facts rest on this module's names

    return HostFacts(
        has_rdma=any(Path("/sys/class/infiniband").glob("*")),
        our_python=sys.executable,
        engine_python=str(setup.EngineEnvironment.of(device).python),
        tiny_model=setup.tiny_model_path(),
        plugins=Path(engines.plugins.__path__[0]),
        new_run_dir=platformdirs.user_state_path(APPLICATION)
        / "runs"
        / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        temporary=_short_temporary(),
        no_proxy=_no_proxy(),
    )


def _no_proxy() -> tuple[str, ...]:
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    return tuple(host.strip() for host in given.split(",") if host.strip())


def _short_temporary() -> Path:
    """A Unix socket's path has at most 107 bytes, and engines add about 65 to this one."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= _LONGEST_TEMPORARY else Path("/tmp")  # noqa: S108  a private folder is made there


def ephemeral_ports() -> tuple[int, int]:
    """The kernel's range for outgoing connections, both ends included."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)


def reserved_ports() -> frozenset[int]:
    """Those in it that the kernel leaves alone."""
    text = Path("/proc/sys/net/ipv4/ip_local_reserved_ports").read_text().strip()
    ends = [part.partition("-") for part in text.split(",") if part]
    return frozenset(n for first, _, last in ends for n in range(int(first), int(last or first) + 1))
