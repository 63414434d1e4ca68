"""Do prefill and decode nodes fit? vLLM compares almost nothing: with another dtype or layout all transfers succeed,
and what the decode node says is fluent nonsense.
"""

from collections.abc import Iterator

from engines.base import Role
from engines.vllm.command import given

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import NodeProcess, Plan
from .findings import Finding, error, warning

_MUST_BE_EQUAL = (
    "--dtype", "--kv-cache-dtype", "--block-size", "--quantization", "--revision", "--code-revision", "--hf-overrides",
    "--rope-scaling", "--rope-theta", "--speculative-config", "--mamba-cache-dtype", "--mamba-ssm-cache-dtype",
    "--mamba-block-size", "--calculate-kv-scales", "--tokenizer", "--tokenizer-mode", "--tokenizer-revision",
    "VLLM_KV_CACHE_LAYOUT", "VLLM_MLA_DISABLE",
)  # fmt: skip
_BETTER_EQUAL = ("--max-model-len", "--attention-backend", "--model-impl", "--enable-lora", "VLLM_ATTENTION_BACKEND")


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    if plan.connector == "none":
        return None
    sizes = {str(role): plan.of(role)[0].seat for role in Role}
    looked_at = ", ".join(f"{role} TP {seat.tensor} PP {seat.pipeline} DP {seat.data}" for role, seat in sizes.items())
    return looked_at, _found(config, plan, facts)


def _found(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    first = plan.nodes[0]
    for name in (*_MUST_BE_EQUAL, *_BETTER_EQUAL):
        tell = error if name in _MUST_BE_EQUAL and not _is_of_its_own(config, plan, name) else warning
        mine = _value(config, first, name)
        other = next((node for node in plan.nodes if _value(config, node, name) != mine), None)
        if other is not None:
            yield tell(
                f"{name} differs: {first.name} has {_said(mine)}, {other.name} {_said(_value(config, other, name))}",
                "KV that one wrote the other would read in another way, and nothing would fail but the answers",
                "Give it in --args, for all nodes" if name.startswith("-") else "Give it in --env, for all nodes",
            )
    yield from _of_sizes(plan, facts)
    speculates = any("--speculative-config" in given(config.arguments_of(n.role, n.name)) for n in plan.nodes)
    if speculates and plan.connector != "MooncakeConnector":
        yield warning(
            f"--speculative-config with {plan.connector}",
            "With a store and draft layers vLLM saves nothing, or ends in an assertion (vLLM #51805, #45785)",
            "Use MooncakeConnector, and see that `up` says that KV moved",
        )


def _is_of_its_own(config: LaunchConfig, plan: Plan, name: str) -> bool:
    """Draft tokens that are found in the prompt add no layers: a decode node may guess by itself."""
    if name != "--speculative-config":
        return False
    given_ones = (_value(config, node, name) for node in plan.nodes)
    return all("ngram" in value for value in given_ones if value)


def _of_sizes(plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    prefill, decode = plan.of(Role.PREFILL)[0].seat, plan.of(Role.DECODE)[0].seat
    larger, smaller = max(prefill.tensor, decode.tensor), min(prefill.tensor, decode.tensor)
    if larger % smaller:
        yield error(
            f"--tensor-parallel prefill={prefill.tensor},decode={decode.tensor}: one must be a multiple of the other",
            "vLLM cuts the KV of one size into that of the other (mooncake_connector.py, _get_tp_ratio)",
            "Choose sizes like 2 and 4",
        )
    elif larger != smaller and facts.model.kv_heads and larger > facts.model.kv_heads:
        yield warning(
            f"the model has {facts.model.kv_heads} KV heads, and nodes of {smaller} and {larger} GPUs",
            "Heads are then kept several times, and vLLM has copied part of them only (#36869, #52516)",
            "Compare answers (`pd-launch test`), or give both roles the same --tensor-parallel",
        )
    if prefill.pipeline != decode.pipeline:
        yield error(
            f"--pipeline-parallel prefill={prefill.pipeline},decode={decode.pipeline}: must be equal",
            "A decode node asks each stage for the layers that it has itself",
            "Give both roles the same",
        )


def _value(config: LaunchConfig, node: NodeProcess, name: str) -> str | None:
    if not name.startswith("-"):
        return node.environment.get(name, node.inherited.get(name))
    flags = given(config.arguments_of(node.role, node.name))
    value = flags.get(name)
    return None if value == "auto" else value  # which is every default


def _said(value: str | None) -> str:
    return "the default" if value is None else value or "it on"
