"""lock.json: all that a run was decided by, so that it can be repeated. It is passed on, so no secret is in it."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.base import NodeRole

from .. import private
from ..errors import ConfigError
from .config import LaunchConfig, PortRange, flag_of
from .plan import Plan
from .seats import Seat
from .secrets import HIDDEN, is_secret, secret_words, shown_value, without_secrets

_FILE = "lock.json"
_COMMANDS = ("args", "prefill_args", "decode_args", "proxy_args")


class LockFile(BaseModel):
    """Written beside a run's logs whenever its plan changes, read by `--locked`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: LaunchConfig
    seats: tuple[Seat, ...]
    versions: dict[str, str]
    """Of the engine's packages."""
    inherited: dict[str, str] = {}
    """What the nodes had of the launcher's own environment."""

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
    def of(cls, config: LaunchConfig, plan: Plan, versions: Mapping[str, str]) -> "LockFile":
        """Of a run as it is now: nodes may have come, gone, or moved to other ports."""
        shown = plan.without_secrets()
        same: dict[str, Any] = {"run_dir": None, "env": _hidden(config.env)}
        same |= {str(role): len(plan.of_kind(role)) for role in NodeRole}
        same |= {name: without_secrets(getattr(config, name)) for name in _COMMANDS}
        same["node_env"] = tuple(map(_hidden_pair, config.node_env))
        same["node_args"] = _hidden_node_args(config.node_args)
        same["transfer_protocol"] = plan.protocol
        store = [port for service in plan.services for port in service.ports]
        if store:
            same["store_ports"] = PortRange(first=store[0].first, last=store[-1].last)
        return cls(
            config=config.model_copy(update=same),
            seats=tuple(node.seat for node in plan.nodes),
            versions=dict(versions),
            inherited=shown.nodes[0].inherited if shown.nodes else {},
        )

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        private.write(folder / _FILE, self.model_dump_json(indent=1) + "\n")

    def repeated(self, flags: Mapping[str, Any], file: Path | None) -> LaunchConfig:
        """The run's configuration, its logs elsewhere. Raises ConfigError for flags that would change anything else,
        and for secrets that are not in the lock file, and not in the environment either.
        """
        others = sorted(flags.keys() - {"run_dir"})
        if others or file:
            given = ", ".join([flag_of(name) for name in others] + ["--config"] * (file is not None))
            raise ConfigError(f"--locked repeats a run as it was; it does not go with {given}")
        run_dir = Path(flags["run_dir"]) if "run_dir" in flags else None
        secrets = {
            "env": self._environment(),
            "node_env": tuple(map(_found_pair, self.config.node_env)),
            "node_args": _found_node_args(self.config.node_args),
        }
        return self.config.model_copy(update={"run_dir": run_dir} | secrets | self._commands())

    def _environment(self) -> dict[str, str]:
        return {name: _found(name) if text == HIDDEN else text for name, text in self.config.env.items()}

    def _commands(self) -> dict[str, tuple[str, ...]]:
        return {field: _found_words(getattr(self.config, field)) for field in _COMMANDS}


def _found_words(words: Sequence[str]) -> tuple[str, ...]:
    """Of a flag's secret the variable is called like the flag: API_KEY for --api-key. Several are one after another."""
    found = []
    for word, flag in secret_words(words):
        value = word.removeprefix(f"{flag}=")
        is_hidden = bool(flag) and value == HIDDEN
        found.append(word.removesuffix(HIDDEN) + _found(variable_of_flag(flag)) if is_hidden else word)
    return tuple(found)


def _hidden_node_args(pairs: Sequence[str]) -> tuple[str, ...]:
    return _each_node(pairs, without_secrets)


def _found_node_args(pairs: Sequence[str]) -> tuple[str, ...]:
    return _each_node(pairs, _found_words)


def _each_node(pairs: Sequence[str], change: Callable[[Sequence[str]], Sequence[str]]) -> tuple[str, ...]:
    """NODE=WORD: the words of each node changed as the command that they are, each in its place."""
    split = [pair.partition("=") for pair in pairs]
    changed = list(pairs)
    for node in {node for node, _, _ in split}:
        places = [place for place, (name, _, _) in enumerate(split) if name == node]
        for place, word in zip(places, change([split[place][2] for place in places]), strict=True):
            changed[place] = f"{node}={word}"
    return tuple(changed)


def variable_of_flag(flag: str) -> str:
    """What a script, or a repeated run, takes the secret of a flag from."""
    return flag.strip("-").replace("-", "_").upper()


def _found(name: str) -> str:
    if name not in os.environ:
        raise ConfigError(
            f"{name} was given to the run that is repeated, and a lock file has no secrets", f"Set {name}"
        )
    return os.environ[name]


def _hidden(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: shown_value(name, text) for name, text in variables.items()}


def _hidden_pair(pair: str) -> str:
    """NODE=NAME=VALUE."""
    node, _, rest = pair.partition("=")
    name, _, _ = rest.partition("=")
    return f"{node}={name}={HIDDEN}" if is_secret(name) else pair


def _found_pair(pair: str) -> str:
    node_and_name, _, text = pair.rpartition("=")
    return f"{node_and_name}={_found(node_and_name.partition('=')[2])}" if text == HIDDEN else pair
