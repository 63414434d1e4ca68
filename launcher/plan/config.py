"""What the user wants. Every field is a flag, a key of the configuration file, and a variable PD_LAUNCH_…."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engines.base import NodeRole
from engines.connectors.names import LaunchedConnector
from engines.known import EngineName
from engines.vllm.command import Device, owned

from ..errors import ConfigError

TINY_MODEL = "tiny"
VARIABLE = "PD_LAUNCH_"
"""... and a field's name: its value unless a flag gives another; it goes before a configuration file's."""
_NO_FIELDS = frozenset({"PD_LAUNCH_ID", "PD_LAUNCH_NODE"})
"""Given to every process of a run."""

_OF_THE_PROXY = {
    "--otlp-traces-endpoint": "is set by pd-launch itself, for nodes and proxy; use --otlp-traces-endpoint",
    "--host": "is set by pd-launch itself; use --proxy-host",
    "--port": "is set by pd-launch itself; use --proxy-port",
    "--admin-port": "is set by pd-launch itself; use --admin-ports",
    "--topology": "is set by pd-launch itself: the nodes are those it starts",
    "--prefill": "does not go with pd-launch, whose nodes are those it starts",
    "--decode": "does not go with pd-launch, whose nodes are those it starts",
    "--config": "may hold what pd-launch sets itself; give the flags one by one",
    "--tls-certificate": "does not go with pd-launch, which asks its proxy over HTTP; put TLS in front of it",
    "--tls-key": "does not go with pd-launch, which asks its proxy over HTTP; put TLS in front of it",
}
"""Flags of the proxy that would contradict the plan, and why: else the run waits for a proxy that is elsewhere."""

_DECIDED_BY_THE_PLAN = {
    "CUDA_VISIBLE_DEVICES": "use --devices",
    "CUDA_DEVICE_ORDER": "devices are numbered by the PCI bus",
    "MC_MIN_RPC_PORT": "use --transfer-ports",
    "MC_MAX_RPC_PORT": "use --transfer-ports",
    "MC_MIN_PRC_PORT": "use --transfer-ports",
    "MC_MAX_PRC_PORT": "use --transfer-ports",
    "MC_STORE_CLIENT_MIN_PORT": "use --store-client-ports",
    "MC_STORE_CLIENT_MAX_PORT": "use --store-client-ports",
    "MC_FORCE_TCP": "use --transfer-protocol",
    "MOONCAKE_CONFIG_PATH": "pd-launch writes that file",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": "use --bootstrap-ports",
    "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "use --transfer-timeout-s",
    "VLLM_HOST_IP": "use --host",
    "VLLM_RPC_BASE_PATH": "each node has a folder of its own for its sockets",
    "TMPDIR": "each node has a folder of its own; set TMPDIR for pd-launch itself",
    "NO_PROXY": "set NO_PROXY for pd-launch itself: it is extended",
    "no_proxy": "set NO_PROXY for pd-launch itself: it is extended",
}
"""Variables with which the nodes would not be what was checked, and what to use instead."""

_OF_ONE_NODE = re.compile(r"((?:prefill|decode)-\d+)=(.+)", re.DOTALL)


class PortRange(BaseModel):
    """First and last port, both included; written `8100-8199`."""

    model_config = ConfigDict(frozen=True)

    first: int = Field(ge=1, le=65535)
    last: int = Field(ge=1, le=65535)

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"{self.first}-{self.last} is reversed, write {self.last}-{self.first}")
        return self

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1

    def overlaps(self, other: "PortRange") -> bool:
        return self.first <= other.last and other.first <= self.last


class PerRole(BaseModel):
    """A size for prefill nodes and one for decode nodes; written `4`, or `prefill=2,decode=4`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: int | None = Field(None, ge=1)
    decode: int | None = Field(None, ge=1)

    def of(self, role: NodeRole) -> int | None:
        """Nodes that do both have the size of both."""
        return self.decode if role is NodeRole.DECODE else self.prefill

    @property
    def is_one(self) -> bool:
        return self.prefill == self.decode

    def __str__(self) -> str:
        if self.is_one:
            return str(self.prefill)
        sizes = {"prefill": self.prefill, "decode": self.decode}
        return ",".join(f"{role}={size}" for role, size in sizes.items() if size is not None)


def _parse_range(value: Any) -> Any:
    if isinstance(value, int):
        return PortRange(first=value, last=value)
    if not isinstance(value, str):
        return value
    first, dash, last = value.partition("-")
    try:
        return {"first": int(first), "last": int(last if dash else first)}
    except ValueError:
        raise ValueError(f"{value!r} is not of the form FIRST-LAST, like 8100-8199") from None


def _parse_per_role(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"prefill": value, "decode": value}
    if not isinstance(value, str):
        return value
    try:
        if "=" not in value:
            return {"prefill": int(value), "decode": int(value)}
        return {role.strip(): int(size) for role, _, size in (part.partition("=") for part in value.split(","))}
    except ValueError:
        raise ValueError(f"{value!r} is no number, and not of the form prefill=2,decode=4") from None


def _text(value: Any) -> str:
    """As people write it on a command line: YAML makes numbers and truth values of some words."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _split_commas(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_text(part) for part in value]
    if isinstance(value, (str, int)):
        return [part.strip() for part in _text(value).split(",") if part.strip()]
    return value


def _split_words(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_text(part) for part in value]
    return shlex.split(_text(value)) if isinstance(value, (str, int)) else value


def _split_environment(value: Any) -> Any:
    if isinstance(value, dict):
        empty = [name for name, text in value.items() if text is None]
        if empty:
            raise ValueError(f"{empty[0]} has no value; write {empty[0]}: '' for an empty one")
        return {str(name): _text(text) for name, text in value.items()}
    if isinstance(value, str):
        value = shlex.split(value)
    if not isinstance(value, list):
        return value
    return dict(_variable(str(item)) for item in value)


def _variable(item: str) -> tuple[str, str]:
    """NAME=VALUE; NAME alone passes on what it is here. Raises ValueError."""
    name, equals, text = item.partition("=")
    if not name:
        raise ValueError("write NAME=VALUE")
    if not equals and name not in os.environ:
        raise ValueError(f"write NAME=VALUE, or the name of a variable that is set here: {name} is not")
    return name, text if equals else os.environ[name]


Ports = Annotated[PortRange, BeforeValidator(_parse_range)]
Sizes = Annotated[PerRole, BeforeValidator(_parse_per_role)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
Words = Annotated[tuple[str, ...], BeforeValidator(_split_words)]
Environment = Annotated[dict[str, str], BeforeValidator(_split_environment)]


class LaunchConfig(BaseModel):
    """A run: which model, how many nodes, where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description=f"Path or name of the model; '{TINY_MODEL}' is made here.")
    served_model_name: Names = Field(
        (), description="Names clients use: a,b. The first is in answers. [default: the model's]"
    )
    engine: EngineName = Field("vllm", description="'sim' is a stand-in that needs no model and no GPU.")
    engine_python: Path | None = Field(
        None, description="Python of an environment that has vllm and mooncake. [default: the one `setup` makes]"
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus answer, in tokens.")

    prefill: int = Field(1, ge=0, description="Number of prefill nodes.")
    decode: int = Field(1, ge=0, description="Number of decode nodes.")
    both: int = Field(
        0,
        ge=0,
        description="Number of nodes that prefill for some requests and decode for others, as load needs it; then the "
        "default of the other two is 0.",
    )
    device: Device = Field("cpu", description="What the engines compute on.")
    devices: Names = Field((), description="GPUs to share out: 0,1,2,3, as CUDA numbers them here, or UUIDs.")
    prefill_devices: Names = Field((), description="... to prefill nodes only.")
    decode_devices: Names = Field((), description="... to decode nodes only.")
    tensor_parallel: Sizes = Field(
        PerRole(), description="GPUs a layer is split over: 2, or prefill=2,decode=4. [default: a node's share]"
    )
    pipeline_parallel: Sizes = Field(PerRole(), description="Stages of layers, likewise. [default: 1]")
    data_parallel: Sizes = Field(PerRole(), description="Engines of one node, likewise. [default: 1]")
    args: Words = Field((), description="Further vLLM flag for every node; repeat for more.")
    prefill_args: Words = Field((), description="... for prefill nodes.")
    decode_args: Words = Field((), description="... for decode nodes.")
    node_args: Words = Field((), description="... for one node: prefill-0=--flag; repeat for more.")
    env: Environment = Field({}, description="NAME=VALUE in every node's environment, or a NAME to pass on; repeat.")
    node_env: Words = Field((), description="... for one node: prefill-0=NAME=VALUE; repeat for more.")

    connector: LaunchedConnector = Field(
        "MooncakeConnector",
        description="How KV gets from node to node: pulled directly, through a shared store, or both. 'none': not at "
        "all, each decode node computes its own prompts.",
    )
    transfer_protocol: Literal["auto", "tcp", "rdma"] = Field(
        "auto", description="How KV moves. 'auto': rdma on GPUs where an RDMA adapter can be used, else tcp."
    )
    rdma_devices: Words = Field(
        (), description="RDMA adapters KV may move over: mlx5_0,mlx5_1; of one node: prefill-0=mlx5_0; repeat."
    )
    transfer_timeout_s: int = Field(60, ge=1, description="How long a prefill node holds KV that nobody fetches.")

    host: str = Field("127.0.0.1", description="Address the nodes bind and tell each other.")
    http_ports: Ports = Field(PortRange(first=8100, last=8199), description="One for each node's API.")
    bootstrap_ports: Ports = Field(PortRange(first=8900, last=8999), description="One for each prefill node.")
    transfer_ports: Ports = Field(
        PortRange(first=20000, last=27999), description="For the transfer engines; a slice for each node."
    )
    transfer_ports_per_node: int = Field(16, ge=4, description="Size of that slice, for each device of the node.")
    store_ports: Ports = Field(
        PortRange(first=8700, last=8709), description="For mooncake_master: RPC and metrics (with a store)."
    )
    store_client_ports: Ports = Field(
        PortRange(first=28000, last=28999), description="For the nodes' store clients; a slice for each node."
    )

    proxy_host: str = Field("127.0.0.1", description="Address the proxy listens on.")
    proxy_port: int = Field(8000, ge=1, le=65535, description="Port the proxy listens on.")
    admin_ports: Ports = Field(
        PortRange(first=8010, last=8019),
        description="One for the proxy's page and admin listener, which is this machine's alone.",
    )
    proxy_args: Words = Field((), description="Further flag for the proxy (`pd-proxy --help`); repeat for more.")

    otlp_traces_endpoint: str | None = Field(
        None,
        min_length=1,
        description="Send the nodes' and the proxy's traces to this OpenTelemetry collector: http://HOST:4317. OTEL_* "
        "variables reach all of them.",
    )

    run_dir: Path | None = Field(None, description="Where logs go. [default: a new folder in the user's state folder]")
    restart: bool = Field(default=True, description="Start a node that died again, with growing pauses.")
    hung_after_s: float = Field(
        120, gt=0, description="A node that answers nothing, or makes no token of its requests, for so long is hung."
    )
    any_version: bool = Field(default=False, description="Go on with a vLLM that was not tried, too.")
    restart_hung: bool = Field(default=False, description="Start a node again that is hung, too.")
    keep: bool = Field(default=False, description="Leave the nodes up when it is not proven that KV moves.")
    ready_timeout_s: float = Field(900, gt=0, description="How long the nodes may take to start.")
    drain_timeout_s: float = Field(120, ge=0, description="How long `restart` and `scale` wait for running answers.")
    stop_timeout_s: float = Field(20, ge=0, description="How long a node may take to stop before it is killed.")

    @model_validator(mode="before")
    @classmethod
    def _has_no_others_than_those_it_needs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("both"):
            return {"prefill": 0, "decode": 0} | given
        if isinstance(given, dict) and given.get("connector") == "none":
            return {"prefill": 0} | given
        return given

    @model_validator(mode="after")
    def _can_serve(self) -> Self:
        if self.connector == "none":
            if self.prefill or self.both or not self.decode:
                raise ValueError(
                    "connector none: each node computes its own prompts, and hands nothing over; give only --decode"
                )
            return self
        if not self.prefill + self.both or not self.decode + self.both or self.prefill + self.decode + self.both < 2:
            raise ValueError(
                f"--prefill {self.prefill}, --decode {self.decode} and --both {self.both} cannot hand over: a run "
                "needs a node that prefills and another one that decodes"
            )
        if not self.both:
            return self
        if self.connector != "MooncakeConnector":
            raise ValueError(f"both: nodes that do both hand over with the MooncakeConnector, not the {self.connector}")
        if self.prefill_devices or self.decode_devices:
            raise ValueError("both: does not go with prefill_devices and decode_devices; use devices")
        for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
            if not getattr(self, name).is_one:
                raise ValueError(f"both: nodes that do both have one size; give {name} one number")
        return self

    @property
    def numbers(self) -> dict[NodeRole, int]:
        """Of nodes, in the order in which they get what is handed out."""
        return {NodeRole.PREFILL: self.prefill, NodeRole.DECODE: self.decode, NodeRole.BOTH: self.both}

    @property
    def nodes_in_words(self) -> str:
        """Like: 1 prefill and 2 decode nodes and 2 nodes that do both."""
        fixed = " and ".join(f"{number} {role}" for role, number in self.numbers.items() if number and role != "both")
        both = [f"{self.both} nodes that do both"] if self.both else []
        return " and ".join([*([f"{fixed} nodes"] if fixed else []), *both])

    @model_validator(mode="after")
    def _leaves_the_plan_its_flags(self) -> Self:
        given = {
            "args": self.args,
            "prefill_args": self.prefill_args,
            "decode_args": self.decode_args,
            "node_args": [words for _, words in self._of_nodes("node_args", "prefill-0=--max-num-seqs")],
        }
        for name, words in given.items():
            for flag, instead in owned(words).items():
                raise ValueError(f"{name}: {flag} is set by pd-launch itself: {instead}")
        for arg in self.proxy_args:
            if reason := _OF_THE_PROXY.get(arg.split("=", 1)[0]):
                raise ValueError(f"proxy_args: {arg.split('=', 1)[0]} {reason}")
        return self

    @model_validator(mode="after")
    def _leaves_the_plan_its_variables(self) -> Self:
        of_nodes = [pair for _, pair in self._of_nodes("node_env", "prefill-0=NAME=VALUE")]
        names = {"env": list(self.env), "node_env": [pair.partition("=")[0] for pair in of_nodes]}
        for field, variables in names.items():
            for name in variables:
                if instead := _DECIDED_BY_THE_PLAN.get(name):
                    raise ValueError(f"{field}: {name} is decided by the plan: {instead}")
        return self

    @model_validator(mode="after")
    def _names_devices_once(self) -> Self:
        apart = self.prefill_devices or self.decode_devices
        if apart and self.devices:
            raise ValueError(
                "devices: does not go with prefill_devices and decode_devices; name each GPU in one of them"
            )
        if apart and not (self.prefill_devices and self.decode_devices):
            raise ValueError("prefill_devices: goes with decode_devices; name the GPUs of both")
        if self.device == "cpu" and (self.devices or apart):
            raise ValueError("devices: are GPUs, and --device is cpu; add --device cuda, or leave --devices away")
        return self

    def arguments_of(self, role: NodeRole, node: str) -> tuple[str, ...]:
        """Further flags of one node, in the order in which the last of equal ones counts."""
        of_role = {NodeRole.PREFILL: self.prefill_args, NodeRole.DECODE: self.decode_args}.get(role, ())
        own = (words for name, words in self._of_nodes("node_args", "") if name == node)
        return (*self.args, *of_role, *own)

    def environment_of(self, node: str) -> dict[str, str]:
        """Further variables of one node."""
        own = (pair.partition("=") for name, pair in self._of_nodes("node_env", "") if name == node)
        return self.env | {name: text for name, _, text in own}

    def rdma_devices_of(self, node: str) -> tuple[str, ...]:
        """The adapters one node may use; none are all."""
        matches = [(_OF_ONE_NODE.fullmatch(word), word) for word in self.rdma_devices]
        own = [match[2] for match, _ in matches if match and match[1] == node]
        words = own or [word for match, word in matches if match is None]
        return tuple(name for word in words for name in word.split(","))

    def of_the_proxy(self, flag: str, default: str) -> str:
        """What a flag among the proxy's has."""
        given = dict(pairwise(self.proxy_args)) | dict(arg.split("=", 1) for arg in self.proxy_args if "=" in arg)
        return given.get(flag, default)

    def devices_of(self, role: NodeRole) -> tuple[str, ...]:
        """Those that only nodes of this role get."""
        return {NodeRole.PREFILL: self.prefill_devices, NodeRole.DECODE: self.decode_devices}.get(role, ())

    def _of_nodes(self, field: str, example: str) -> list[tuple[str, str]]:
        """(node, the rest) of each NODE=REST. Raises ValueError for one that is not of that form."""
        matches = [_OF_ONE_NODE.fullmatch(word) for word in getattr(self, field)]
        if not all(matches):
            raise ValueError(f"{field}: write NODE=…, like {example}")
        return [(match[1], match[2]) for match in matches if match]


def load(
    flags: Mapping[str, Any], file: Path | None = None, variables: Mapping[str, str] | None = None
) -> LaunchConfig:
    """The configuration file's settings, then the variables', then the flags that were given. Raises ConfigError."""
    of_variables = _from_variables(variables or {})
    settings = {**(_read(file) if file else {}), **of_variables, **flags}
    try:
        return LaunchConfig.model_validate(settings)
    except ValidationError as exc:
        problems = (_in_words(error, file, flags, of_variables) for error in exc.errors())
        raise ConfigError("; ".join(problems)) from exc


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    return VARIABLE + field.upper()


def _from_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """Raises ConfigError for one that no field is called like."""
    fields = {variable_of(field): field for field in LaunchConfig.model_fields}
    mine = {name: text for name, text in variables.items() if name.startswith(VARIABLE) and name not in _NO_FIELDS}
    unknown = sorted(mine.keys() - fields.keys())
    if unknown:
        raise ConfigError(f"{unknown[0]} is set, and no flag is called like it", "`pd-launch up --help` lists them")
    return {fields[name]: text for name, text in mine.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text())
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(exc).split())}") from exc
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{file} must hold settings, one 'key: value' a line")
    return {key.replace("-", "_"): value for key, value in settings.items()}


def _in_words(error: Any, file: Path | None, flags: Mapping[str, Any], variables: Mapping[str, Any]) -> str:
    place: Sequence[Any] = error["loc"]
    field = str(place[0]) if place else ""
    where = f"{file}: {field}"
    if field in flags or (file is None and field not in variables):
        where = flag_of(field)
    elif field in variables:
        where = variable_of(field)
    if error["type"] == "extra_forbidden" and len(place) == 1:
        return f"{file}: unknown key {field!r}; known are {', '.join(LaunchConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{flag_of(field)} is missing (or '{field}:' in a --config file)"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    inside = "".join(f"{part}: " for part in place[1:])
    return f"{where}: {inside}{message}" if field else message
