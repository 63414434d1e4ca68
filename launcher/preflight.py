"""Everything that can be checked before something starts. Nothing is started when a check fails."""

import os
from pathlib import Path

from engines.mooncake import PORTS_PER_TRANSFER_ENGINE

from . import setup
from .config import TINY_MODEL, LaunchConfig, flag_of
from .errors import PortBusyError, PreflightError
from .plan import NodeProcess, Plan, Port, is_local_path
from .ports import Busy, busy_ports

_SPARE_TRANSFER_PORTS = 2
"""The transfer engine draws ports at random; a few more than it needs keep it from drawing in vain."""

_DRAWN_FROM = ("transfer", "store client")
"""Slices from which a node draws a port that is free; every other port is the only one of its kind."""

_FLAG_OF_PURPOSE = {
    "api": "http_ports",
    "bootstrap": "bootstrap_ports",
    "transfer": "transfer_ports",
    "store": "store_ports",
    "store client": "store_client_ports",
    "proxy": "proxy_port",
}


def check(config: LaunchConfig, plan: Plan) -> None:
    """Raises PreflightError or PortBusyError, worst first: what no other port would mend comes before the ports."""
    _check_model(config)
    if config.engine == "vllm":
        setup.quick_versions(Path(plan.nodes[0].command[0]))
        _check_services(plan)
    _check_run_dir(plan.run_dir)
    _check_ports(plan)


def _check_model(config: LaunchConfig) -> None:
    if config.engine == "sim" or config.model == TINY_MODEL or not is_local_path(config.model):
        return
    path = Path(config.model).expanduser()
    if not path.exists():
        raise PreflightError(f"--model {config.model}: no such folder", "Give a folder with a config.json, or a name")
    if path.is_dir() and not (path / "config.json").exists():
        raise PreflightError(f"--model {config.model} has no config.json in it", "Is it the model's own folder?")


def _check_services(plan: Plan) -> None:
    for service in plan.services:
        if not Path(service.command[0]).exists():
            raise PreflightError(
                f"{service.command[0]}: no such program, and the {plan.connector} needs it",
                "It comes with the mooncake-transfer-engine package",
            )


def _check_run_dir(folder: Path) -> None:
    """Logs must have a place before there is something to log."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise PreflightError(f"cannot make {folder} for the logs: {exc.strerror}", "Choose with --run-dir") from exc
    if not os.access(folder, os.W_OK):
        raise PreflightError(f"cannot write logs to {folder}", "Choose another place with --run-dir")


def _check_ports(plan: Plan) -> None:
    problems = []
    for process in plan.processes:
        devices = len(process.devices) if isinstance(process, NodeProcess) else 0
        for port in process.ports:
            busy = busy_ports(port)
            if busy and _hurts(port, busy, devices):
                problems.append(f"{process.name}: {_in_words(port, busy)}")
    if problems:
        flags = "  ".join(f"{flag_of(name)}" for name in _FLAG_OF_PURPOSE.values())
        raise PortBusyError("\n".join(problems), f"End what holds them, or choose other ports with {flags}")


def _hurts(port: Port, busy: list[Busy], devices: int) -> bool:
    """A transfer engine tries further ports of its slice; every other child has just the one."""
    if port.purpose not in _DRAWN_FROM:
        return True
    free = port.last - port.first + 1 - len(busy)
    return free < PORTS_PER_TRANSFER_ENGINE * max(1, devices) + _SPARE_TRANSFER_PORTS


def _in_words(port: Port, busy: list[Busy]) -> str:
    if port.purpose not in _DRAWN_FROM:
        return f"{port.purpose} port {port.first} on {port.bind} is taken by {busy[0].holder}"
    size = port.last - port.first + 1
    return f"{len(busy)} of the {size} {port.purpose} ports {port} are taken, {busy[0].port} by {busy[0].holder}"
