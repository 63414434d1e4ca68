"""How KV moves: over what was asked for, or over what is here."""

from collections.abc import Iterator

from engines.base import Role
from engines.vllm.command import given

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts, rdma_problem, rdma_remedy
from ..plan.plan import Plan
from .findings import Finding, error, warning


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    if plan.connector == "none":
        return "none: each node computes its own prompts", iter(())
    return f"{plan.connector} over {plan.protocol} ({plan.protocol_why})", _found(config, plan, facts)


def _found(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    problem = rdma_problem(facts)
    if plan.protocol == "rdma" and problem:
        yield error(
            f"--transfer-protocol rdma: {problem}",
            "Mooncake would use TCP instead, without a word",
            f"{rdma_remedy(facts)}, or --transfer-protocol tcp",
        )
    elif plan.protocol == "tcp" and config.transfer_protocol == "auto" and config.device == "cuda" and facts.rdma:
        yield warning(
            f"KV moves over TCP: {plan.protocol_why}",
            "An RDMA adapter is here, and over TCP a hand-off takes several times as long",
            f"{rdma_remedy(facts)}; --transfer-protocol tcp says that TCP is meant",
        )
    if plan.protocol == "rdma" and not problem and facts.locked_memory_kib is not None:
        yield warning(
            f"{facts.locked_memory_kib // 2**20} GiB may be locked (ulimit -l)",
            "RDMA locks the whole KV cache; where it is larger a node does not start",
            "ulimit -l unlimited (in a container: --ulimit memlock=-1)",
        )
    yield from _of_adapters(config, plan, facts)
    yield from _of_late_kv(config, plan)


def _of_adapters(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    named = dict.fromkeys(name for node in plan.nodes for name in config.rdma_devices_of(node.name))
    if named and plan.protocol == "tcp":
        yield warning(
            f"--rdma-devices {','.join(named)}: not used, KV moves over TCP",
            plan.protocol_why,
            "Leave it away, or --transfer-protocol rdma",
        )
        return
    here = {adapter.name: adapter for adapter in facts.rdma}
    for name in named:
        if name not in here:
            yield error(f"--rdma-devices {name}: not here", "", f"Here are {', '.join(here) or 'none'}")
        elif not here[name].has_active_port:
            yield error(f"--rdma-devices {name}: none of its ports is ACTIVE", "", "Check its cable and switch")


def _of_late_kv(config: LaunchConfig, plan: Plan) -> Iterator[Finding]:
    caching = [
        node.name
        for node in plan.of(Role.DECODE)
        if "--enable-prefix-caching" in given(config.arguments_of(node.role, node.name))
    ]
    if caching and plan.protocol == "tcp" and plan.connector != "MooncakeStoreConnector":
        yield warning(
            f"{', '.join(caching)}: --enable-prefix-caching on a decode node that pulls over TCP",
            "A transfer that was given up may arrive late, into blocks of the cache: wrong answers (engines/README.md)",
            "Leave it away, or use RDMA",
        )
