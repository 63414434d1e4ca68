"""Everything that will be started, as values: complete, so that nobody has to parse a command line of ours."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from engines import topology
from engines.base import NodeRole, Role
from engines.connectors import mooncake
from engines.connectors.names import ConnectorName
from engines.known import EngineName
from engines.vllm.command import Device

from .facts import Frozen
from .seats import Port, Seat
from .secrets import shown_value, without_secrets

UNPINNED_PORTS = (
    "prefill nodes: one ephemeral port a device for the hand-off's side channel (ZMQ), dialled by decode nodes",
    "every node: about a dozen ephemeral ports a device for gloo and NCCL, between the node's own processes",
)
"""vLLM has no setting for these; a firewall between hosts must let the ephemeral range through, decode to prefill."""


class Process(Frozen):
    """One child. Its environment is `inherited` and `environment`, and nothing else."""

    name: str
    kind: Literal["service", "node", "proxy"]
    command: tuple[str, ...]
    environment: dict[str, str]
    """Set for the child."""
    inherited: dict[str, str] = Field(default_factory=dict)
    """Passed on from the launcher's own environment."""
    ports: tuple[Port, ...]
    log: Path
    stops_within_s: float = 0
    """How long it may take to stop whatever nodes may: it finishes what it has begun."""


class NodeProcess(Process):
    """A serving engine."""

    kind: Literal["service", "node", "proxy"] = "node"
    role: NodeRole
    url: str
    bootstrap: str | None
    devices: tuple[str, ...] = ()
    seat: Seat


AnyProcess = TypeVar("AnyProcess", bound=Process)


class Download(Frozen):
    """A model of the hub that is fetched before anything starts."""

    model: str
    revision: str | None


class Plan(Frozen):
    """Everything that will be started: the nodes side by side, then the proxy."""

    engine: EngineName
    engine_python: str
    """Of the environment the engines run in."""
    device: Device
    connector: ConnectorName
    protocol: mooncake.Protocol
    """How KV moves: as asked for, or chosen from the hardware."""
    protocol_why: str
    model: str
    download: Download | None = None
    served_names: tuple[str, ...]
    """What clients may call it; the first is the one that answers name."""
    run_dir: Path
    temporary: Path
    """Folder of sockets and the like, removed at the end. Its name is short: a Unix socket's path is <= 107 bytes."""
    services: tuple[Process, ...]
    """What the nodes need before they start, and after they stop."""
    nodes: tuple[NodeProcess, ...]
    proxy: Process
    proxy_url: str
    admin_url: str
    """Of the proxy's page."""
    files: dict[str, str]
    """Configuration files written into the run directory, by name."""
    passed_over: tuple[str, ...] = ()
    """Ports of the ranges that would have been used, had they been free."""
    unpinned_ports: tuple[str, ...] = UNPINNED_PORTS

    @property
    def topology_file(self) -> Path:
        return self.run_dir / "topology.json"

    @property
    def served_model_name(self) -> str:
        return self.served_names[0]

    @property
    def processes(self) -> tuple[Process, ...]:
        return (*self.services, *self.nodes, self.proxy)

    @property
    def ports(self) -> list[Port]:
        """Every port and slice that the children will bind."""
        return [port for process in self.processes for port in process.ports]

    @property
    def devices(self) -> tuple[str, ...]:
        """Each of the nodes' once."""
        return tuple(dict.fromkeys(device for node in self.nodes for device in node.devices))

    def of(self, role: Role) -> tuple[NodeProcess, ...]:
        """Those that do it, if need be among other things."""
        return tuple(node for node in self.nodes if node.role.does(role))

    def of_kind(self, role: NodeRole) -> tuple[NodeProcess, ...]:
        """Those that are there for just this."""
        return tuple(node for node in self.nodes if node.role is role)

    def topology(self, draining: Collection[str] = (), findings: Mapping[str, str] | None = None) -> topology.Topology:
        """The nodes, as the proxy is told of them; those `draining` get no new requests. `findings`: why some ended."""
        nodes = (
            topology.Node(
                name=node.name,
                role=node.role,
                url=node.url,
                bootstrap=node.bootstrap,
                drain=node.name in draining,
                log=node.log,
                finding=(findings or {}).get(node.name, ""),
            )
            for node in self.nodes
        )
        return topology.Topology(
            connector=self.connector, engine=self.engine, models=self.served_names, nodes=tuple(nodes)
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
        """To be shown and passed on: keys, tokens and passwords are left out."""
        return self.model_copy(
            update={
                "services": tuple(map(_without_secrets, self.services)),
                "nodes": tuple(map(_without_secrets, self.nodes)),
                "proxy": _without_secrets(self.proxy),
            }
        )

    def as_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2)


def _without_secrets(process: AnyProcess) -> AnyProcess:
    def hidden(variables: dict[str, str]) -> dict[str, str]:
        return {name: shown_value(name, value) for name, value in variables.items()}

    return process.model_copy(
        update={
            "environment": hidden(process.environment),
            "inherited": hidden(process.inherited),
            "command": without_secrets(process.command),
        }
    )
