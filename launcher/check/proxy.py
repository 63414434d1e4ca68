"""The proxy's own flags: it is started last, and would end a run whose nodes took minutes to come up."""

from collections.abc import Iterator

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import Plan
from .findings import Finding, error


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    del plan
    looked_at = f"{len(config.proxy_args)} words of --proxy-args" if config.proxy_args else "no flags of its own"
    return looked_at, _found(facts)


def _found(facts: HostFacts) -> Iterator[Finding]:
    if facts.proxy_problem:
        yield error(f"--proxy-args: {facts.proxy_problem}", "", "`pd-proxy --help` lists its flags")
