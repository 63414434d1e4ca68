"""A plan whose ports are free now, and kept from other launchers until the run is over."""

import random
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from . import facts, ports, private, setup
from .config import LaunchConfig, PortRange, flag_of
from .errors import ConfigError, PortBusyError
from .facts import HostFacts
from .plan import Plan, make_plan
from .ports import Locks
from .seats import Port, Seat, ranges_of

_FILE = "lock.json"
_TRIES = 20
_LONGEST_PAUSE_S = 0.1


class LockFile(BaseModel):
    """All that a run was decided by, so that it can be repeated: written beside its logs, read by `--locked`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: LaunchConfig
    seats: tuple[Seat, ...]
    versions: dict[str, str]
    """Of the engine's packages."""

    @classmethod
    def read(cls, file: Path) -> "LockFile":
        """Raises ConfigError."""
        try:
            return cls.model_validate_json(file.read_text())
        except OSError as exc:
            raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
        except ValidationError as exc:
            raise ConfigError(f"{file} is not a lock file: {exc.errors()[0]['msg']}", "`up` writes lock.json") from exc

    @classmethod
    def of(cls, config: LaunchConfig, plan: Plan) -> "LockFile":
        store = [port for service in plan.services for port in service.ports]
        same = {"run_dir": None}
        if store:
            same["store_ports"] = PortRange(first=store[0].first, last=store[-1].last)  # type: ignore[assignment]
        versions = setup.quick_versions(Path(plan.nodes[0].command[0])) if config.engine == "vllm" else {}
        seats = tuple(node.seat for node in plan.nodes)
        return cls(config=config.model_copy(update=same), seats=seats, versions=versions)

    def write(self, folder: Path) -> None:
        private.write(folder / _FILE, self.model_dump_json(indent=1) + "\n")

    def repeated(self, flags: Mapping[str, Any], file: Path | None) -> LaunchConfig:
        """The run's configuration, its logs elsewhere. Raises ConfigError for flags that would change anything else."""
        others = sorted(flags.keys() - {"run_dir"})
        if others or file:
            given = ", ".join([flag_of(name) for name in others] + ["--config"] * (file is not None))
            raise ConfigError(f"--locked repeats a run as it was; it does not go with {given}")
        return self.config.model_copy(update={"run_dir": Path(flags["run_dir"]) if "run_dir" in flags else None})


def survey(config: LaunchConfig) -> HostFacts:
    """What this host is like now, its taken ports included."""
    return replace(facts.gather(config.device), taken=ports.taken(ranges_of(config)))


def reserve(config: LaunchConfig, lock: LockFile | None = None) -> tuple[Plan, Locks]:
    """Another launcher may be choosing from the same ranges: whoever comes second chooses again.

    Raises ConfigError, or PortBusyError when too little is free, or what `lock` wants is not.
    """
    seats = lock.seats if lock else ()
    for tried in range(1, _TRIES + 1):
        plan = make_plan(config, survey(config), seats)
        locks = Locks()
        try:
            locks.take(ports_of(plan))
        except PortBusyError:
            if tried == _TRIES or seats:
                raise
            time.sleep(random.uniform(0, _LONGEST_PAUSE_S))  # noqa: S311  so that two do not meet again and again
        else:
            return plan, locks
    raise AssertionError


def ports_of(plan: Plan) -> list[Port]:
    """Every port and slice that a plan's children will bind."""
    return list(chain.from_iterable(process.ports for process in plan.processes))
