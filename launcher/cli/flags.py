"""One flag for each field of the configuration, in groups: the flags are the configuration file's keys."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from ..plan.config import LaunchConfig, PerRole, PortRange, flag_of, load
from ..plan.lockfile import LockFile

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": ("model", "served_model_name", "max_model_len", "engine", "engine_python", "any_version"),
    "Nodes": (
        "prefill", "decode", "both", "device", "devices", "prefill_devices", "decode_devices", "tensor_parallel",
        "pipeline_parallel", "data_parallel", "args", "prefill_args", "decode_args", "node_args", "env", "node_env",
    ),
    "KV transfer": ("connector", "transfer_protocol", "rdma_devices", "transfer_timeout_s"),
    "Addresses and ports": (
        "host", "http_ports", "bootstrap_ports", "transfer_ports", "transfer_ports_per_node", "store_ports",
        "store_client_ports",
    ),
    "Proxy": ("proxy_host", "proxy_port", "admin_ports", "proxy_args"),
    "Run": (
        "run_dir", "otlp_traces_endpoint",
        "restart", "hung_after_s", "restart_hung", "keep", "ready_timeout_s", "drain_timeout_s",
        "stop_timeout_s",
    ),
}  # fmt: skip
_METAVARS = {
    "engine_python": "PATH", "run_dir": "PATH", "devices": "IDS", "prefill_devices": "IDS", "decode_devices": "IDS",
    "otlp_traces_endpoint": "URL",
    "env": "NAME=VALUE", "node_env": "NODE=NAME=VALUE", "node_args": "NODE=FLAG", "rdma_devices": "NAMES",
}  # fmt: skip


class GroupedCommand(TyperCommand):
    """Its options are listed under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        arguments = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(record)
            else:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        own = groups.pop("Options", [])
        for heading, records in (("Arguments", arguments), *groups.items(), ("Options", own)):
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def from_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for each field of LaunchConfig, --config and --locked; it gets what they say."""
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name not in ("config", "lock")
    ]
    flags = [_flag(name, group) for group, names in GROUPS.items() for name in names]
    file = _file("config", "YAML file with these flags as keys.")
    locked = _file("locked", "Repeat the run that wrote this lock.json, ports and all.")

    def with_configuration(config: Path | None, locked: Path | None, **values: Any) -> None:
        flags = {name: values.pop(name) for name in list(values) if name in LaunchConfig.model_fields}
        given = {name: value for name, value in flags.items() if value is not None}
        lock = LockFile.read(locked) if locked else None
        loaded = lock.repeated(given, config) if lock else load(given, config, os.environ)
        command(config=loaded, lock=lock, **values)

    with_configuration.__doc__ = command.__doc__
    with_configuration.__name__ = command.__name__
    with_configuration.__signature__ = inspect.Signature([*flags, file, locked, *own])  # type: ignore[attr-defined]
    return with_configuration


def _file(name: str, text: str) -> inspect.Parameter:
    annotation = Annotated[Path | None, typer.Option(metavar="FILE", help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(name: str, group: str) -> inspect.Parameter:
    """Values are checked by the model, whose messages name the flag or the file they came from."""
    field = LaunchConfig.model_fields[name]
    many = name in ("args", "prefill_args", "decode_args", "node_args", "env", "node_env", "proxy_args", "rdma_devices")
    is_switch = field.annotation is bool
    kind: Any = bool if is_switch else list[str] if many else str
    is_shown = isinstance(field.default, (str, int, float, PortRange)) and not field.is_required()
    default = f" [default: {_said(field.default)}]" if is_shown else ""
    choices = "|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None
    flag = f"{flag_of(name)}/--no-{name.replace('_', '-')}" if is_switch else flag_of(name)
    option = typer.Option(
        flag,
        help=f"{field.description}{default}",
        metavar=None if is_switch else choices or _metavar(name),
        show_default=False,
        rich_help_panel=group,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _said(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _metavar(name: str) -> str:
    if name.endswith("_ports"):
        return "FIRST-LAST"
    if isinstance(LaunchConfig.model_fields[name].default, PerRole):
        return "N"
    if name in ("prefill", "decode", "both", "proxy_port") or name.endswith(("_s", "_len", "_node")):
        return "N"
    return _METAVARS.get(name, "TEXT")
