"""A run that is repeated (`--locked`): is the engine the same, and what the nodes inherit."""

from collections.abc import Iterator

from ..plan.facts import HostFacts
from ..plan.lockfile import LockFile
from ..plan.plan import Plan
from ..plan.secrets import HIDDEN
from .findings import Checked, Finding, error, warning

_OF_THE_SHELL = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TERM", "XDG_", "SLURM_", "LC_", "LANG")
"""They differ from one shell to the next, and no engine cares."""


def check(lock: LockFile, plan: Plan, facts: HostFacts) -> Checked:
    return Checked("repeat", "the engine's versions, and what nodes inherit", tuple(_found(lock, plan, facts)))


def _found(lock: LockFile, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    for name, version in lock.versions.items():
        now = facts.engine.versions.get(name, "gone")
        if now != version:
            yield error(
                f"{name} was {version}, now {now}",
                "A run that is repeated needs the same engine",
                "Leave --locked away",
            )
    after = plan.without_secrets().nodes[0].inherited
    for name in sorted(lock.inherited.keys() | after.keys()):
        then, is_now = lock.inherited.get(name), after.get(name)
        if then != is_now and not name.startswith(_OF_THE_SHELL):
            yield warning(
                f"{name} was {_said(then)}, now it is {_said(is_now)}",
                "The nodes inherit it",
                "Set it as it was, if it matters",
            )


def _said(value: str | None) -> str:
    return "not set" if value is None else "set" if value == HIDDEN else value
