"""Variables and flags with which nodes would not start, or not be what the proxy takes them for."""

from collections.abc import Iterator

from engines.vllm.command import given

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import NodeProcess, Plan
from .findings import Finding, error, warning


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    passed_on = len(plan.nodes[0].inherited)
    return f"{passed_on} variables of this shell reach the nodes", _found(config, plan, facts)


def _found(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    if "VLLM_USE_V1" in facts.environment:
        yield warning("VLLM_USE_V1 is set", "vLLM has had one engine since 0.11; nodes start without it", "Unset it")
    for node in plan.nodes:
        if config.device == "cuda" and "expandable_segments:True" in _variable(node, "PYTORCH_CUDA_ALLOC_CONF"):
            yield error(
                "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True",
                "Memory that moves cannot be registered for a transfer; vLLM refuses it with any KV connector",
                "Take it out",
            )
            break
    for word in facts.relative_paths:
        yield error(
            f"{word} is a path from here, and the run's children are started elsewhere",
            "They would not find it",
            "Write all of it, from the root on",
        )
    keyed = [
        node.name
        for node in plan.nodes
        if "--api-key" in given(config.arguments_of(node.role, node.name)) or "VLLM_API_KEY" in node.environment
    ]
    if keyed and "PD_NODE_API_KEY" not in facts.environment:
        yield error(
            f"{', '.join(keyed)}: started with a key, and the proxy has none",
            "Every request of the proxy would be refused (401)",
            "Set PD_NODE_API_KEY to the same key",
        )


def _variable(node: NodeProcess, name: str) -> str:
    return node.environment.get(name) or node.inherited.get(name, "")
