"""All checks: what no other port would fix comes before the ports."""

from collections.abc import Callable, Iterator

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.lockfile import LockFile
from ..plan.plan import Plan
from . import engine, environment, fit, gpus, machine, model, network, ports, proxy, repeat, transfer
from .findings import Checked, Finding

Check = Callable[[LaunchConfig, Plan, HostFacts], tuple[str, Iterator[Finding]] | None]
"""What was looked at, and what was found; None when there is nothing of the kind in this plan."""

CHECKS: dict[str, Check] = {
    "model": model.check,
    "engine": engine.check,
    "environment": environment.check,
    "GPUs": gpus.check,
    "KV transfer": transfer.check,
    "fit": fit.check,
    "machine": machine.check,
    "network": network.check,
    "proxy": proxy.check,
    "ports": ports.check,
}


def check(config: LaunchConfig, plan: Plan, facts: HostFacts, lock: LockFile | None = None) -> list[Checked]:
    """Every theme that this plan has. `lock`: of a run that is repeated."""
    found = []
    for theme, look in CHECKS.items():
        said = look(config, plan, facts)
        if said is not None:
            looked_at, findings = said
            found.append(Checked(theme, looked_at, tuple(sorted(findings, key=lambda finding: finding.severity))))
    if lock is not None:
        found.append(repeat.check(lock, plan, facts))
    return found
