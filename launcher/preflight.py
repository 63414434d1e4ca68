"""Everything that can be checked before something starts. Nothing is started when an error is found."""

import ipaddress
import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.version import InvalidVersion, Version

from . import facts, setup
from .config import TINY_MODEL, LaunchConfig, flag_of
from .errors import LauncherError, PortBusyError, PreflightError
from .plan import Plan, is_local_path
from .ports import Busy, busy_ports
from .seats import Port

_FLAG_OF_PURPOSE = {
    "api": "http_ports",
    "bootstrap": "bootstrap_ports",
    "transfer": "transfer_ports",
    "store": "store_ports",
    "store client": "store_client_ports",
    "proxy": "proxy_port",
}

_OLDEST_MOONCAKE = Version("0.3.3.post2")
"""Before it the reader of a transfer dumps core: "Result should only be set once" (Mooncake #495)."""
_NAMES_ITS_PORTS = Version("0.3.11")
_GIB = 2**30
_LEAST_FILES = 1024
_ENOUGH_FILES = 8192
_LEAST_SHARED_MEMORY = 64 * 2**20
"""A node's: vLLM passes messages between its processes there."""
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  not ours to name
_LEAST_DISK = _GIB
_NO_DISK = 2**20
_CPU_NODE_BYTES = 3 * _GIB
"""Resident, of a node on a CPU with a tiny model (CPU_ENGINE)."""

_USED_BY_OTHERS = (
    (6379, 6379, "Ray's and Redis' default"),
    (8265, 8265, "Ray's dashboard"),
    (10002, 19999, "Ray's workers"),
    (15000, 17000, "the transfer engine of a vLLM that was given no range"),
    (29500, 29500, "torch's rendezvous"),
    (29550, 29550, "vLLM's data-parallel RPC"),
    (30000, 32767, "Kubernetes' NodePorts"),
)

_DECIDED_BY_THE_PLAN = frozenset(
    {
        "MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT", "MC_MIN_PRC_PORT", "MC_MAX_PRC_PORT", "VLLM_MOONCAKE_BOOTSTRAP_PORT",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", "VLLM_HOST_IP", "MOONCAKE_CONFIG_PATH",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, why that matters, how to mend it."""

    severity: Literal["error", "warning"]
    what: str
    why: str
    mend: str
    exit_code: int = PreflightError.exit_code

    def as_error(self) -> LauncherError:
        kind = PortBusyError if self.exit_code == PortBusyError.exit_code else PreflightError
        return kind(f"{self.what}\n{self.why}" if self.why else self.what, self.mend)


def check(config: LaunchConfig, plan: Plan, locked: Mapping[str, str]) -> list[Finding]:
    """Everything that is found, errors first: what no other port would mend comes before the ports.

    `locked`: versions that the engine's packages must have, of a run that is repeated.
    """
    found = [*_environment(config), *_machine(config, plan), *_addresses(config), *_ports(plan)]
    found = [*_model(config), *_engine(config, plan, locked), *_folders(plan), *found]
    return sorted(found, key=lambda finding: finding.severity)


def refuse_errors(findings: list[Finding]) -> None:
    """Raises PreflightError or PortBusyError for the first error."""
    for finding in findings:
        if finding.severity == "error":
            raise finding.as_error()


def _error(what: str, why: str, mend: str) -> Finding:
    return Finding("error", what, why, mend)


def _warning(what: str, why: str, mend: str) -> Finding:
    return Finding("warning", what, why, mend)


# -- the model and the engine


def _model(config: LaunchConfig) -> Iterator[Finding]:
    if config.engine == "sim" or config.model == TINY_MODEL or not is_local_path(config.model):
        return
    path = Path(config.model).expanduser()
    if not path.exists():
        yield _error(f"--model {config.model}: no such folder", "", "Give a folder with a config.json, or a name")
    elif path.is_dir() and not (path / "config.json").exists():
        yield _error(f"--model {config.model} has no config.json in it", "", "Is it the model's own folder?")


def _engine(config: LaunchConfig, plan: Plan, locked: Mapping[str, str]) -> Iterator[Finding]:
    if config.engine != "vllm":
        return
    try:
        versions = setup.quick_versions(Path(plan.nodes[0].command[0]))
    except PreflightError as exc:
        yield _error(str(exc), "", exc.hint)
        return
    yield from of_versions(versions)
    changed = {name: f"{version}, now {versions.get(name, 'gone')}" for name, version in locked.items()}
    for name, how in changed.items():
        if versions.get(name) != locked[name]:
            yield _error(f"{name} was {how}", "A run that is repeated needs the same engine", "Leave --locked away")
    for service in plan.services:
        if not Path(service.command[0]).exists():
            yield _error(
                f"{service.command[0]}: no such program, and the {plan.connector} needs it",
                "",
                "It comes with the mooncake-transfer-engine package",
            )


def of_versions(versions: Mapping[str, str]) -> Iterator[Finding]:
    """What is known of versions of the engine's packages."""
    mooncake = {name: version for name, version in versions.items() if name.startswith("mooncake-transfer-engine")}
    if len(mooncake) > 1:
        yield _error(
            f"{' and '.join(mooncake)} are both installed",
            "They are one import package in two builds, and the one installed last is used",
            "Uninstall both, then install the one for this machine",
        )
    for name, text in mooncake.items():
        try:
            version = Version(text)
        except InvalidVersion:
            continue
        if version < _OLDEST_MOONCAKE:
            yield _error(
                f"{name} is {text}, which is older than {_OLDEST_MOONCAKE}",
                'Its transfers end in a core dump: "Result should only be set once"',
                "Upgrade it, to the same version on every node",
            )
        elif version < _NAMES_ITS_PORTS:
            yield _warning(
                f"{name} is {text}",
                "It is older than what pd-launch is tested with (port ranges are named in an older way)",
                f"Upgrade it to {setup.MOONCAKE_VERSION}",
            )


def _environment(config: LaunchConfig) -> Iterator[Finding]:
    mine = os.environ | config.env
    if "VLLM_USE_V1" in os.environ:
        yield _warning("VLLM_USE_V1 is set", "vLLM has had one engine since 0.11; nodes start without it", "Unset it")
    if config.device == "cuda" and "expandable_segments:True" in mine.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        yield _error(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True",
            "Memory that moves cannot be registered for a transfer; vLLM refuses it with any KV connector",
            "Take it out",
        )
    owned = sorted(_DECIDED_BY_THE_PLAN & config.env.keys())
    if owned:
        yield _error(
            f"--env {', '.join(owned)}: decided by the plan",
            "With another value the nodes would not be what was checked",
            "Use the flag for it: --transfer-ports, --bootstrap-ports, --transfer-timeout-s, --host",
        )


# -- the machine


def _folders(plan: Plan) -> Iterator[Finding]:
    """Logs must have a place before there is something to log."""
    folder = plan.run_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as exc:
        yield _error(f"cannot make {folder} for the logs: {exc.strerror}", "", "Choose another place with --run-dir")
        return
    free = shutil.disk_usage(folder).free
    if free < _NO_DISK:
        yield _error(f"no room for logs in {folder}", "The disk is full", "Make room, or choose with --run-dir")
    elif free < _LEAST_DISK:
        yield _warning(
            f"{free // 2**20} MiB are free where the logs go", f"{folder}", "Make room, or choose with --run-dir"
        )


def _machine(config: LaunchConfig, plan: Plan) -> Iterator[Finding]:
    if config.engine == "sim":
        return
    nodes = len(plan.nodes)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files != resource.RLIM_INFINITY and most_files < _ENOUGH_FILES:
        tell = _error if most_files < _LEAST_FILES else _warning
        why = "Every client is a socket in the proxy and one in a node"
        yield tell(f"at most {most_files} files may be open (ulimit -n)", why, f"Raise it to {_ENOUGH_FILES}")
    shared = shutil.disk_usage(_SHARED_MEMORY).free
    if shared < _LEAST_SHARED_MEMORY * nodes:
        yield _error(
            f"{_SHARED_MEMORY} has {shared // 2**20} MiB free, {nodes} nodes need about {64 * nodes}",
            "A node's processes talk through it, and die of SIGBUS when it is full",
            "Make it larger (in a container: --shm-size), or remove what is left in it",
        )
    if config.device == "cpu":
        available = psutil.virtual_memory().available
        if available < _CPU_NODE_BYTES * nodes:
            yield _warning(
                f"{available / _GIB:.1f} GiB of memory are available, {nodes} nodes on a CPU take about {3 * nodes}",
                "A node that gets none is killed by the kernel, without a word in its log",
                "Start fewer nodes, or free memory",
            )
    else:
        yield from _gpus(config, plan)
    if plan.protocol == "rdma":
        yield from _rdma(config)


def _gpus(config: LaunchConfig, plan: Plan) -> Iterator[Finding]:
    if not config.devices and len(plan.nodes) > 1:
        yield _error(
            f"--device cuda without --devices: all {len(plan.nodes)} nodes would take the first GPU",
            "Each of them takes nine tenths of its memory, and only one starts",
            "Give one GPU (or two, four ...) for each node, like --devices 0,1",
        )
    present = {path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")}
    if not present:
        yield _error("no NVIDIA device here (/dev/nvidia0)", "", "Check the driver; in a container, pass the GPUs in")
        return
    missing = [device for device in config.devices if device.isdigit() and device not in present]
    if missing:
        yield _error(f"--devices {','.join(missing)}: not here", "", f"Here are {', '.join(sorted(present))}")
    shared = len(config.devices) != len(set(config.devices))
    if shared and not any("gpu-memory-utilization" in arg for arg in (*config.args, *config.prefill_args)):
        yield _warning(
            "a device is given to two nodes",
            "Each takes 0.9 of its memory unless told otherwise, and the second does not start",
            "--args=--gpu-memory-utilization --args=0.45",
        )


def _rdma(config: LaunchConfig) -> Iterator[Finding]:
    """Also where it was chosen because there is a device: Mooncake goes back to TCP without a word."""
    if not any(Path("/sys/class/infiniband").glob("*")):
        yield _error(
            "--transfer-protocol rdma, and this host has no RDMA device",
            "Mooncake would use TCP instead, without a word",
            "--transfer-protocol tcp, or check the device (/sys/class/infiniband is empty)",
        )
        return
    or_tcp = "" if config.transfer_protocol == "rdma" else ", or --transfer-protocol tcp"
    if not any(Path("/dev/infiniband").glob("uverbs*")):
        yield _error(
            "this host has an RDMA device, and no /dev/infiniband/uverbs* to use it by",
            "In a container the device is seen in /sys also where it was not passed in",
            f"Pass /dev/infiniband into the container{or_tcp}",
        )
    _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY:
        yield _error(
            f"only {locked // 1024} KiB may be locked (ulimit -l)",
            "RDMA registers the whole KV cache, which locks it in memory",
            f"ulimit -l unlimited (in a container: --ulimit memlock=-1){or_tcp}",
        )


def _addresses(config: LaunchConfig) -> Iterator[Finding]:
    if ":" in config.host:
        yield _error(
            f"--host {config.host} is an IPv6 address",
            "vLLM's bootstrap server listens on IPv4 only, and a prefill node would never become ready",
            "Name one of this host's IPv4 addresses",
        )
    if _is_wildcard(config.host):
        yield _error(
            f"--host {config.host} is no address that a peer could connect to",
            "Nodes bind it and tell it each other",
            "Name one of this host's addresses",
        )
    resolved = _own_name_resolves_to()
    if resolved is None:
        yield _warning(
            f"this host's name, {socket.gethostname()}, resolves to no address",
            "gloo looks it up for the sockets between a node's processes",
            f"Add a line to /etc/hosts: 127.0.0.1 {socket.gethostname()}",
        )
    elif resolved.startswith("127.") and not _is_loopback(config.host):
        yield _warning(
            f"this host's name, {socket.gethostname()}, resolves to {resolved}",
            "What looks it up tells others an address at which they reach themselves",
            f"In /etc/hosts, give the name its own address: {config.host} {socket.gethostname()}",
        )
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    past = os.environ.get("no_proxy", "") + "," + os.environ.get("NO_PROXY", "")
    if proxies and config.proxy_host not in past and "*" not in past:
        yield _warning(
            f"{proxies[0]} is set, and NO_PROXY does not name {config.proxy_host}",
            "curl and the OpenAI client would ask that proxy for ours (pd-launch and its nodes do not)",
            f"export NO_PROXY=$NO_PROXY,{config.proxy_host}",
        )
    if not _is_loopback(config.proxy_host) and not os.environ.get("PD_PROXY_API_KEYS"):
        yield _warning(
            f"anyone who reaches {config.proxy_host}:{config.proxy_port} may use it",
            "It listens beyond loopback and has no keys",
            "Set PD_PROXY_API_KEYS",
        )


def _is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::", "*")  # noqa: S104  looked for, not bound


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _own_name_resolves_to() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


# -- ports


def _ports(plan: Plan) -> Iterator[Finding]:
    problems = []
    yield from _ephemeral(plan)
    for process in plan.processes:
        for port in process.ports:
            try:
                busy = busy_ports(port)
            except LauncherError as exc:
                yield _error(f"{process.name}: {exc}", "", exc.hint)
                continue
            if port.last - port.first + 1 - len(busy) < port.needed:
                problems.append(f"{process.name}: {_in_words(port, busy)}")
            yield from _used_by_others(process.name, port)
    if problems:
        flags = "  ".join(f"{flag_of(name)}" for name in _FLAG_OF_PURPOSE.values())
        mend = f"End what holds them, or choose other ports with {flags}"
        yield Finding("error", "\n".join(problems), "", mend, PortBusyError.exit_code)


def _ephemeral(plan: Plan) -> Iterator[Finding]:
    """Ports are held until their node listens, but a node that is down for a moment cannot hold them."""
    first, last = facts.ephemeral_ports()
    reserved = facts.reserved_ports()
    ours = [port for process in plan.processes for port in process.ports]
    at_risk = [p for p in ours if any(first <= n <= last and n not in reserved for n in (p.first, p.last))]
    if at_risk:
        listed = ", ".join(f"{port.purpose} {port}" for port in at_risk[:3]) + (" ..." if len(at_risk) > 3 else "")
        yield _warning(
            f"{listed}: in {first}-{last}, from which the kernel takes ports for outgoing connections",
            "Any program may take one at any moment",
            "Choose ports outside it, or reserve them: sysctl net.ipv4.ip_local_reserved_ports",
        )


def _used_by_others(name: str, port: Port) -> Iterator[Finding]:
    for first, last, whose in _USED_BY_OTHERS:
        if first <= port.last and port.first <= last:
            yield _warning(
                f"{name}: {port.purpose} {port} is where {whose} may turn up",
                "Free now is not free later",
                f"Choose another range with {flag_of(_FLAG_OF_PURPOSE[port.purpose])}, if that runs here",
            )
            return


def _in_words(port: Port, busy: list[Busy]) -> str:
    if port.first == port.last:
        return f"{port.purpose} port {port.first} on {port.bind} is taken by {busy[0].holder}"
    size = port.last - port.first + 1
    return f"{len(busy)} of the {size} {port.purpose} ports {port} are taken, {busy[0].port} by {busy[0].holder}"
