"""What the user wants. Every field is a flag of `plan` and `up` and a key of the configuration file, in one word."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engines.vllm.command import OWNED_FLAGS

from .errors import ConfigError

TINY_MODEL = "tiny"


_OF_THE_PROXY = {
    "--host": "is set by pd-launch itself; use --proxy-host",
    "--port": "is set by pd-launch itself; use --proxy-port",
    "--topology": "is set by pd-launch itself: the nodes are those it starts",
    "--prefill": "does not go with pd-launch, whose nodes are those it starts",
    "--decode": "does not go with pd-launch, whose nodes are those it starts",
    "--config": "may hold what pd-launch sets itself; give the flags one by one",
    "--tls-certificate": "does not go with pd-launch, which asks its proxy over HTTP; put TLS in front of it",
    "--tls-key": "does not go with pd-launch, which asks its proxy over HTTP; put TLS in front of it",
}
"""Flags of the proxy that would contradict the plan, and why: else the run waits for a proxy that is elsewhere."""

_NODE_ARGUMENT = re.compile(r"(prefill|decode)-\d+=.")


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


def _split_commas(value: Any) -> Any:
    if isinstance(value, int):
        value = str(value)
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_environment(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    pairs = [str(item).partition("=") for item in value]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError("write NAME=VALUE")
    return {name: text for name, _, text in pairs}


Ports = Annotated[PortRange, BeforeValidator(_parse_range)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
Environment = Annotated[dict[str, str], BeforeValidator(_split_environment)]


class LaunchConfig(BaseModel):
    """A run: which model, how many nodes, where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description=f"Path or name of the model; '{TINY_MODEL}' is made here.")
    served_model_name: str | None = Field(None, description="Name clients use. [default: the model's]")
    prefill: int = Field(1, ge=1, description="Number of prefill nodes.")
    decode: int = Field(1, ge=1, description="Number of decode nodes.")
    engine: Literal["vllm", "sim"] = Field("vllm", description="'sim' is a stand-in that needs no model and no GPU.")
    engine_python: Path | None = Field(
        None, description="Python of an environment that has vllm and mooncake. [default: the one `setup` makes]"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="What the engines compute on.")
    devices: Names = Field((), description="GPUs, as in CUDA_VISIBLE_DEVICES, shared out evenly: 0,1,2,3")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus answer, in tokens.")
    args: tuple[str, ...] = Field((), description="Further vLLM flag for every node; repeat for more.")
    prefill_args: tuple[str, ...] = Field((), description="... for prefill nodes.")
    decode_args: tuple[str, ...] = Field((), description="... for decode nodes.")
    node_args: tuple[str, ...] = Field((), description="... for one node: prefill-0=--flag; repeat for more.")
    env: Environment = Field({}, description="NAME=VALUE in every node's environment; repeat for more.")
    connector: Literal["MooncakeConnector", "MooncakeStoreConnector", "MultiConnector"] = Field(
        "MooncakeConnector",
        description="How KV gets from node to node: pulled directly, through a shared store, or both.",
    )
    host: str = Field("127.0.0.1", description="Address the nodes bind and tell each other.")
    http_ports: Ports = Field(PortRange(first=8100, last=8199), description="One for each node's API.")
    bootstrap_ports: Ports = Field(PortRange(first=8900, last=8999), description="One for each prefill node.")
    transfer_ports: Ports = Field(
        PortRange(first=20000, last=27999), description="For the transfer engines; a slice for each node."
    )
    store_ports: Ports = Field(
        PortRange(first=8700, last=8709), description="For mooncake_master: RPC and metrics (with a store)."
    )
    store_client_ports: Ports = Field(
        PortRange(first=28000, last=28999), description="For the nodes' store clients; a slice for each node."
    )
    transfer_ports_per_node: int = Field(16, ge=4, description="Size of that slice, for each device of the node.")
    transfer_protocol: Literal["auto", "tcp", "rdma"] = Field(
        "auto", description="How KV moves. 'auto': rdma on GPUs when there is an RDMA device, else tcp."
    )
    transfer_timeout_s: int = Field(60, ge=1, description="How long a prefill node holds KV that nobody fetches.")
    proxy_host: str = Field("127.0.0.1", description="Address the proxy listens on.")
    proxy_port: int = Field(8000, ge=1, le=65535, description="Port the proxy listens on.")
    proxy_args: tuple[str, ...] = Field(
        (), description="Further flag for the proxy (`pd-proxy --help`); repeat for more."
    )
    restart: bool = Field(default=True, description="Start a node that died again, with growing pauses.")
    ready_timeout_s: float = Field(900, gt=0, description="How long the nodes may take to start.")
    stop_timeout_s: float = Field(20, ge=0, description="How long a node may take to stop before it is killed.")
    run_dir: Path | None = Field(None, description="Where logs go. [default: a new folder in the user's state folder]")

    @model_validator(mode="after")
    def _leaves_the_plan_its_flags(self) -> Self:
        if not all(_NODE_ARGUMENT.match(arg) for arg in self.node_args):
            raise ValueError("node_args: write NODE=ARGUMENT, like prefill-0=--max-num-seqs")
        of_nodes = (arg.split("=", 1)[1] for arg in self.node_args)
        given = {"args": self.args, "prefill_args": self.prefill_args, "decode_args": self.decode_args}
        for name, arguments in (given | {"node_args": tuple(of_nodes)}).items():
            owned = sorted(OWNED_FLAGS & {arg.split("=", 1)[0] for arg in arguments})
            if owned:
                raise ValueError(f"{name}: {', '.join(owned)} is set by pd-launch itself; use its own flag")
        for arg in self.proxy_args:
            if reason := _OF_THE_PROXY.get(arg.split("=", 1)[0]):
                raise ValueError(f"proxy_args: {arg.split('=', 1)[0]} {reason}")
        return self


def load(flags: Mapping[str, Any], file: Path | None) -> LaunchConfig:
    """The configuration file's settings, overridden by the flags that were given. Raises ConfigError."""
    settings = {**(_read(file) if file else {}), **flags}
    try:
        return LaunchConfig.model_validate(settings)
    except ValidationError as exc:
        raise ConfigError("; ".join(_in_words(error, file, flags) for error in exc.errors())) from exc


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


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


def _in_words(error: Any, file: Path | None, flags: Mapping[str, Any]) -> str:
    field = str(error["loc"][0]) if error["loc"] else ""
    where = flag_of(field) if field in flags or file is None else f"{file}: {field}"
    if error["type"] == "extra_forbidden":
        return f"{file}: unknown key {field!r}; known are {', '.join(LaunchConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{flag_of(field)} is missing (or '{field}:' in a --config file)"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{where}: {message}" if field else message
