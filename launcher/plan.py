"""What will be started: a pure function from the configuration and facts about the host."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Literal, TypeVar

from engines import topology
from engines.base import Role
from engines.connectors import mooncake, mooncake_store
from engines.connectors.names import ConnectorName
from engines.vllm import command

from .config import TINY_MODEL, LaunchConfig
from .errors import ConfigError
from .facts import HostFacts
from .seats import (
    ANY,
    Frozen,
    Port,
    Room,
    Seat,
    check_ranges,
    devices_a_node,
    has_store,
    seat_for,
    seats_of,
    store_client_ports_drawn,
    transfer_ports_drawn,
)

UNPINNED_PORTS = (
    "prefill nodes: one ephemeral port a device for the hand-off's side channel (ZMQ), dialled by decode nodes",
    "every node: about a dozen ephemeral ports a device for gloo and NCCL, between the node's own processes",
)
"""vLLM has no setting for these; a firewall between hosts must let the ephemeral range through, decode to prefill."""

_WAITS_FOR_KV = 5 / 6
"""Share of the engines' transfer timeout that the proxy waits for decode's first event: it must know first."""
HIDDEN = "***"
_SECRET = re.compile(r"(?i)(^|_)(key|token|secret|password)(_|$)")
_STORE_FILE = "mooncake.json"
_PROXY_GRACE_S = 30.0
"""pd-proxy's own default of --shutdown-grace-s."""
_PROXY_ENDS_S = 10.0


class Process(Frozen):
    """One child."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    """Set for the child, on top of the launcher's own environment."""
    unset: tuple[str, ...] = ()
    ports: tuple[Port, ...]
    log: Path
    stops_within_s: float = 0
    """How long it may take to stop whatever nodes may: it finishes what it has begun."""


class NodeProcess(Process):
    """A serving engine."""

    role: Role
    url: str
    bootstrap: str | None
    devices: tuple[str, ...] = ()
    seat: Seat


AnyProcess = TypeVar("AnyProcess", bound=Process)


class Plan(Frozen):
    """Everything that will be started: the nodes side by side, then the proxy."""

    engine: Literal["vllm", "sim"]
    connector: ConnectorName
    protocol: mooncake.Protocol
    """How KV moves: as asked for, or chosen from the hardware."""
    model: str
    served_model_name: str
    run_dir: Path
    temporary: Path
    """Folder of sockets and the like, removed at the end. Its name is short: a Unix socket's path is <= 107 bytes."""
    services: tuple[Process, ...]
    """What the nodes need before they start, and after they stop."""
    nodes: tuple[NodeProcess, ...]
    proxy: Process
    proxy_url: str
    files: dict[str, str]
    """Configuration files written into the run directory, by name."""
    passed_over: tuple[str, ...] = ()
    """Ports of the ranges that would have been used, had they been free."""
    unpinned_ports: tuple[str, ...] = UNPINNED_PORTS

    @property
    def topology_file(self) -> Path:
        return self.run_dir / "topology.json"

    @property
    def processes(self) -> tuple[Process, ...]:
        return (*self.services, *self.nodes, self.proxy)

    def topology(self, draining: Collection[str] = ()) -> topology.Topology:
        """The nodes, as the proxy is told of them; those `draining` get no new requests."""
        nodes = (
            topology.Node(
                name=node.name, role=node.role, url=node.url, bootstrap=node.bootstrap, drain=node.name in draining
            )
            for node in self.nodes
        )
        return topology.Topology(
            connector=self.connector, engine=self.engine, models=(self.served_model_name,), nodes=tuple(nodes)
        )

    def without(self, name: str) -> "Plan":
        """The plan with one node less."""
        return self.model_copy(update={"nodes": tuple(node for node in self.nodes if node.name != name)})

    def with_node(self, new: NodeProcess) -> "Plan":
        """The plan with one node more, or another in the place of the one of that name."""
        is_new = all(node.name != new.name for node in self.nodes)
        nodes = [new if node.name == new.name else node for node in self.nodes]
        return self.model_copy(update={"nodes": (*nodes, new) if is_new else tuple(nodes)})

    def without_secrets(self) -> "Plan":
        """To be shown and passed on: what `--env` and `--args` give as keys, tokens and passwords is left out."""
        return self.model_copy(
            update={
                "services": tuple(map(_without_secrets, self.services)),
                "nodes": tuple(map(_without_secrets, self.nodes)),
                "proxy": _without_secrets(self.proxy),
            }
        )

    def as_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of that name holds one."""
    return _SECRET.search(name.replace("-", "_")) is not None


def _without_secrets(process: AnyProcess) -> AnyProcess:
    environment = {name: HIDDEN if is_secret(name) else value for name, value in process.environment.items()}
    words = secret_words(process.command)
    command = tuple(
        word if not flag else f"{flag}={HIDDEN}" if word.startswith(flag) else HIDDEN for word, flag in words
    )
    return process.model_copy(update={"environment": environment, "command": command})


def secret_words(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word, and the flag whose secret it holds; an empty one for all others."""
    before = ""
    for word in command:
        flag, equals, _ = word.partition("=")
        is_one = flag.startswith("--") and is_secret(flag)
        yield word, flag if is_one and equals else before
        before = flag if is_one and not equals else ""


def make_plan(config: LaunchConfig, facts: HostFacts, seats: Sequence[Seat] = ()) -> Plan:
    """`seats`: the ports and devices to give out, of a run that is to be repeated; else they are chosen here.

    Raises ConfigError when the configuration cannot be carried out on any host, or not on this one, and PortBusyError
    when too many ports of a range are taken.
    """
    check_ranges(config)
    room = Room(config, facts)
    run_dir = (config.run_dir or facts.new_run_dir).expanduser().absolute()
    temporary = facts.temporary / f"pdl-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]}"
    chosen = tuple(seats) or tuple(seats_of(config, room))
    nodes = tuple(_node(config, facts, seat, run_dir, temporary) for seat in chosen)
    store = room.take("store_ports", 2) if has_store(config) else 0
    return Plan(
        engine=config.engine,
        connector=config.connector,
        protocol=_protocol(config, facts),
        services=tuple(_services(config, facts, run_dir, store)),
        files=_files(config, facts, store),
        model=_model_argument(config, facts),
        served_model_name=_served_name(config),
        run_dir=run_dir,
        temporary=temporary,
        nodes=nodes,
        proxy=_proxy(config, facts, run_dir),
        proxy_url=_url(config.proxy_host, config.proxy_port),
        passed_over=tuple(room.passed_over),
    )


def another_node(plan: Plan, config: LaunchConfig, facts: HostFacts, role: Role) -> NodeProcess:
    """A further node of a role for a plan that runs. Raises ConfigError or PortBusyError."""
    names = {node.name for node in plan.nodes}
    name = next(name for number in count() if (name := f"{role}-{number}") not in names)
    in_use = Counter(device for node in plan.nodes for device in node.devices)
    devices = devices_a_node(config, config.prefill + config.decode)
    free = list((Counter(config.devices) - in_use).elements())
    if len(free) < devices:
        raise ConfigError(
            f"no device is left for {name}: every one of {','.join(config.devices)} is in use",
            "Stop a node first, or start with more --devices",
        )
    seat = seat_for(config, Room(config, facts), name, role, tuple(free[:devices]))
    return _node(config, facts, seat, plan.run_dir, plan.temporary)


def moved_node(plan: Plan, config: LaunchConfig, facts: HostFacts, node: NodeProcess) -> NodeProcess:
    """The same node on other ports. Raises PortBusyError when none is left."""
    seat = seat_for(config, Room(config, facts), node.name, node.role, node.devices)
    return _node(config, facts, seat, plan.run_dir, plan.temporary)


def _node(config: LaunchConfig, facts: HostFacts, seat: Seat, run_dir: Path, temporary: Path) -> NodeProcess:
    role_args = config.prefill_args if seat.role is Role.PREFILL else config.decode_args
    own_args = [arg.split("=", 1)[1] for arg in config.node_args if arg.startswith(f"{seat.name}=")]
    launch = command.Launch(
        role=seat.role,
        model=_model_argument(config, facts),
        served_model_name=_served_name(config),
        host=config.host,
        port=seat.http_port,
        device=config.device,
        protocol=_protocol(config, facts),
        transfer_ports=seat.transfer_ports,
        bootstrap_port=seat.bootstrap_port,
        transfer_timeout_s=config.transfer_timeout_s,
        connector=config.connector,
        store=command.Store(str(run_dir / _STORE_FILE), seat.store_client_ports) if seat.store_client_ports else None,
        max_model_len=config.max_model_len,
        devices=seat.devices,
        extra_args=(*config.args, *role_args, *own_args),
        no_proxy=facts.no_proxy,
    )
    own_folder = str(temporary / seat.name)
    environment = command.environment(launch) | {"TMPDIR": own_folder, "VLLM_RPC_BASE_PATH": own_folder}
    if config.engine == "vllm" and "kv_connector_module_path" in "".join(command.arguments(launch)):
        environment["PYTHONPATH"] = str(facts.plugins)
    if config.model == TINY_MODEL:
        environment["HF_HUB_OFFLINE"] = "1"
    return NodeProcess(
        name=seat.name,
        role=seat.role,
        command=(*_engine_command(config, facts), *command.arguments(launch)),
        environment=environment | config.env,
        unset=command.UNSET,
        ports=tuple(_ports(config, seat)),
        url=_url(config.host, seat.http_port),
        bootstrap=_url(config.host, seat.bootstrap_port) if seat.bootstrap_port else None,
        devices=seat.devices,
        seat=seat,
        log=run_dir / f"{seat.name}.log",
    )


def _ports(config: LaunchConfig, seat: Seat) -> Iterator[Port]:
    workers = max(1, len(seat.devices))
    yield Port(purpose="api", first=seat.http_port, last=seat.http_port, bind=config.host)
    if seat.bootstrap_port is not None:  # vLLM binds it on every address, whatever the node's own
        yield Port(purpose="bootstrap", first=seat.bootstrap_port, last=seat.bootstrap_port, bind=ANY)
    if config.engine == "vllm":
        first, last = seat.transfer_ports
        drawn = transfer_ports_drawn(config, workers)
        yield Port(purpose="transfer", first=first, last=last, bind=ANY, needed=drawn)  # so does the transfer engine
    if seat.store_client_ports is not None:
        first, last = seat.store_client_ports
        drawn = store_client_ports_drawn(workers)
        yield Port(purpose="store client", first=first, last=last, bind=ANY, needed=drawn)


def _services(config: LaunchConfig, facts: HostFacts, run_dir: Path, rpc: int) -> Iterator[Process]:
    if not has_store(config):
        return
    metrics = rpc + 1
    master = Path(_engine_python(config, facts)).with_name(mooncake_store.MASTER)
    yield Process(
        name="store",
        command=(str(master), *mooncake_store.master_arguments(config.host, rpc, metrics)),
        environment={},
        ports=tuple(
            Port(purpose="store", first=port, last=port, bind=bind)
            for port, bind in ((rpc, config.host), (metrics, ANY))  # its metrics, on every address
        ),
        log=run_dir / "store.log",
    )


def _files(config: LaunchConfig, facts: HostFacts, rpc: int) -> dict[str, str]:
    if not has_store(config):
        return {}
    protocol = _protocol(config, facts)
    return {_STORE_FILE: mooncake_store.store_config(config.host, rpc, protocol)}


def _engine_command(config: LaunchConfig, facts: HostFacts) -> tuple[str, ...]:
    if config.engine == "sim":
        return facts.our_python, "-P", "-m", "engines.sim"
    return _engine_python(config, facts), "-m", "vllm.entrypoints.openai.api_server"


def _engine_python(config: LaunchConfig, facts: HostFacts) -> str:
    return str(config.engine_python.expanduser().absolute()) if config.engine_python else facts.engine_python


def _proxy(config: LaunchConfig, facts: HostFacts, run_dir: Path) -> Process:
    command = (facts.our_python, "-P", "-m", "proxy.cli", "--topology", str(run_dir / "topology.json"))
    listening = ("--host", config.proxy_host, "--port", str(config.proxy_port))
    waiting = ("--decode-start-timeout-s", f"{config.transfer_timeout_s * _WAITS_FOR_KV:g}")
    port = Port(purpose="proxy", first=config.proxy_port, last=config.proxy_port, bind=config.proxy_host)
    return Process(
        name="proxy",
        command=(*command, *listening, *waiting, *config.proxy_args),
        environment={"PYTHONUNBUFFERED": "1"},
        ports=(port,),
        log=run_dir / "proxy.log",
        stops_within_s=_proxy_stops_within_s(config),
    )


def _proxy_stops_within_s(config: LaunchConfig) -> float:
    """Its delay and its grace time, which are flags of its own, and a moment to end what is left by then."""
    given = dict(pairwise(config.proxy_args))
    given |= dict(arg.split("=", 1) for arg in config.proxy_args if "=" in arg)
    delay, grace = given.get("--shutdown-delay-s", "0"), given.get("--shutdown-grace-s", f"{_PROXY_GRACE_S}")
    try:
        return float(delay) + float(grace) + _PROXY_ENDS_S
    except ValueError:  # the proxy refuses it in its own words
        return _PROXY_GRACE_S + _PROXY_ENDS_S


def _protocol(config: LaunchConfig, facts: HostFacts) -> mooncake.Protocol:
    if config.transfer_protocol != "auto":
        return config.transfer_protocol
    return "rdma" if config.device == "cuda" and facts.has_rdma else "tcp"


def _model_argument(config: LaunchConfig, facts: HostFacts) -> str:
    if config.engine == "sim":
        return config.model
    if config.model == TINY_MODEL:
        return str(facts.tiny_model)
    return str(Path(config.model).expanduser().absolute()) if is_local_path(config.model) else config.model


def _served_name(config: LaunchConfig) -> str:
    if config.served_model_name:
        return config.served_model_name
    return Path(config.model).name if is_local_path(config.model) else config.model


def is_local_path(model: str) -> bool:
    """A path, and not a name like `Qwen/Qwen3-8B` that the engine looks up."""
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..")


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
