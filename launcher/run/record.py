"""What a run writes down for others: its state for the commands, its topology for the proxy, its lock file."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from engines.topology import Topology

from .. import private
from ..inspect.runs import RunFolder, RunState
from ..plan.config import LaunchConfig
from ..plan.lockfile import LockFile
from ..plan.plan import Plan


class Record:
    """Of one run. A disk without room ends nothing: it is said once, and tried again with every state."""

    def __init__(self, folder: RunFolder, config: LaunchConfig, versions: Mapping[str, str]) -> None:
        self._folder = folder
        self._config = config
        self._versions = versions
        self._is_writable = True
        self._unwritten: dict[str, Callable[[], None]] = {}
        self._told_drained: frozenset[str] = frozenset()
        """Nodes that were, in what was last written."""
        self._drained_by_others: frozenset[str] = frozenset()
        self.say: Callable[[str], None] = lambda _: None

    def state(self, state: RunState) -> None:
        """... and what there was no room for."""
        self._written(lambda: self._folder.write(state))
        self._write_the_rest()

    def lock(self, plan: Plan) -> None:
        """By which the run can be repeated, as it is now."""
        lock = LockFile.of(self._config, plan, self._versions)
        self._unwritten["lock"] = lambda: lock.write(self._folder.path)
        self._write_the_rest()

    def topology(self, file: Path, made: Callable[[Collection[str]], Topology]) -> None:
        """Whole or not at all: the proxy may read it at any moment. `made` from the nodes that others have drained."""
        self._unwritten["topology"] = lambda: self._write_topology(file, made)
        self._write_the_rest()

    def _write_topology(self, file: Path, made: Callable[[Collection[str]], Topology]) -> None:
        """Somebody may have drained nodes by the proxy's admin listener, which writes the file, too: they stay so."""
        with suppress(OSError, ValueError):  # there is none yet
            now = _drained(Topology.model_validate_json(file.read_bytes()))
            self._drained_by_others = (self._drained_by_others & now) | (now - self._told_drained)
        new = made(self._drained_by_others)
        private.write(file, new.model_dump_json(indent=2) + "\n")
        self._told_drained = _drained(new)

    def _write_the_rest(self) -> None:
        for name, write in tuple(self._unwritten.items()):
            if self._written(write):
                del self._unwritten[name]

    def _written(self, write: Callable[[], None]) -> bool:
        was_writable = self._is_writable
        try:
            write()
            self._is_writable = True
        except OSError as exc:
            self._is_writable = False
            if was_writable:
                self.say(
                    f"cannot write to {self._folder.path}: {exc.strerror}. The run goes on; logs are lost meanwhile."
                )
        else:
            if not was_writable:
                self.say(f"{self._folder.path} can be written to again.")
        return self._is_writable


def _drained(nodes: Topology) -> frozenset[str]:
    return frozenset(node.name for node in nodes.nodes if node.drain)
