"""The seam between the control plane and the data plane: which nodes there are, and where.

Written whole by whatever starts nodes (pd-launch on this host, or any other scheduler), read by the proxy. As JSON:

    {"connector": "MooncakeConnector", "engine": "vllm", "models": ["m"],
     "nodes": [{"name": "prefill-0", "role": "prefill", "url": "http://10.0.0.1:8100",
                "bootstrap": "http://10.0.0.1:8998"},
               {"name": "decode-0", "role": "decode", "url": "http://10.0.0.2:8200"}]}

A node of the role "both" prefills for some requests and decodes for others; it has a bootstrap server, too.
"""

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .base import NodeRole, Role
from .connectors.names import CONNECTORS, ConnectorName
from .known import EngineName


def _base_url(url: str) -> str:
    """`http://host[:port]`, nothing behind it: the engine appends its own path (`/query`) to a bootstrap address."""
    parts = urlsplit(url)
    try:
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
    if parts.scheme != "http" or not parts.hostname or not port_is_valid:
        raise ValueError(f"{url!r} is not of the form http://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url!r} has more than http://host:port in it; leave the rest away")
    return f"http://{parts.netloc}"


BaseURL = Annotated[str, AfterValidator(_base_url)]


class Node(BaseModel):
    """One running engine server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    role: NodeRole
    url: BaseURL
    bootstrap: BaseURL | None = None
    """Where the Mooncake bootstrap server of a node that prefills answers, as seen from the *decode nodes*."""
    drain: bool = False
    """It gets no new requests; what runs there goes on."""
    log: Path | None = None
    """The file its output goes to, where whoever started it and the proxy are on one host."""
    finding: str = ""
    """Why it ended when it last did, as whoever started it found in the logs."""


class Topology(BaseModel):
    """Every node the proxy may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    connector: ConnectorName = "MooncakeConnector"
    engine: EngineName = "vllm"
    models: tuple[str, ...] = ()
    """What every node serves, when whoever wrote this knows it; else most of the nodes say."""
    max_model_len: int | None = Field(None, ge=1)
    """... and up to how many tokens."""
    nodes: tuple[Node, ...] = ()

    @model_validator(mode="after")
    def _each_node_once(self) -> Self:
        for what in ("name", "url", "bootstrap"):
            values = [value for node in self.nodes if (value := getattr(node, what)) is not None]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"more than one node has the {what} {', '.join(twice)}; each needs its own")
        return self

    @model_validator(mode="after")
    def _every_identity_can_be_found(self) -> Self:
        if CONNECTORS[self.connector].has_bootstrap:
            without = [node.name for node in self.of(Role.PREFILL) if node.bootstrap is None]
            if without:
                raise ValueError(f"node {without[0]!r} needs 'bootstrap', the address of its bootstrap server")
        return self

    @model_validator(mode="after")
    def _hands_over_with_a_connector(self) -> Self:
        if not CONNECTORS[self.connector].moves_kv and self.of(Role.PREFILL):
            raise ValueError("without a connector all nodes are decode nodes: each computes its own prompts")
        return self

    def of(self, role: Role) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.role.does(role))
