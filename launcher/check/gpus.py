"""GPUs: are they here, is there room in them, and does each node have its own."""

from collections import Counter
from collections.abc import Iterator

from engines.vllm.command import given

from ..plan.config import LaunchConfig
from ..plan.devices import visible
from ..plan.facts import Gpu, HostFacts
from ..plan.plan import NodeProcess, Plan
from .findings import Finding, error, warning

_UTILIZATION = "--gpu-memory-utilization"
_DEFAULT_UTILIZATION = 0.92
"""vLLM 0.32, CacheConfig."""


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    if config.device != "cuda":
        return None
    kinds = Counter(gpu.name for gpu in facts.gpus)
    seen = ", ".join(f"{number} x {name}" for name, number in kinds.items()) or "none"
    return f"{seen}, driver {facts.driver or 'unknown'}", _found(config, plan, facts)


def _found(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    if not facts.gpus:
        yield error(
            f"no NVIDIA GPU is seen here: {facts.gpu_problem}",
            "",
            "Check the driver (`nvidia-smi`); in a container, pass the GPUs in",
        )
        return
    by_id = {gpu.id: gpu for gpu in visible(facts)}
    for node in plan.nodes:
        for device in node.devices:
            if device not in by_id:
                yield error(
                    f"{node.name}: GPU {device} is not here, or not for programs started here",
                    "A lock file names the GPUs of the run that it repeats",
                    f"Here are {', '.join(by_id) or 'none'} (CUDA_VISIBLE_DEVICES counts); leave --locked away",
                )
        own = [by_id[device] for device in node.devices if device in by_id]
        if len(own) > 1 and any(gpu.is_mig for gpu in own):
            yield error(
                f"{node.name}: {len(own)} MIG devices for one node",
                "NCCL cannot talk between MIG devices, so a node lies on one",
                "Give each node one device, or whole GPUs",
            )
    yield from _of_room(config, plan, by_id)


def _of_room(config: LaunchConfig, plan: Plan, by_id: dict[str, Gpu]) -> Iterator[Finding]:
    """VLLM takes its share of a GPU at once, and refuses to start where that is not free (v1/worker/utils.py)."""
    wanted: Counter[str] = Counter()
    for node in plan.nodes:
        for device in node.devices:
            wanted[device] += round(100 * _utilization(config, node))
    for device, percent in wanted.items():
        gpu = by_id.get(device)
        users = [node.name for node in plan.nodes if device in node.devices]
        if len(users) > 1 and percent > 100:
            yield error(
                f"GPU {device} is given to {', '.join(users)}, which want {percent} % of its memory",
                "The one that comes second does not start",
                f"--args={_UTILIZATION}={0.9 / len(users):.2f}, or a GPU for each node",
            )
        elif len(users) > 1:
            yield warning(
                f"GPU {device} is given to {', '.join(users)}",
                "They are started one after the other: vLLM measures the GPU's memory while it starts",
                "A GPU for each node, where there are enough",
            )
        if gpu is not None and gpu.memory_mib and gpu.free_mib * 100 < gpu.memory_mib * min(percent, 100):
            yield error(
                f"GPU {gpu.number} has {gpu.free_mib // 1024} of {gpu.memory_mib // 1024} GiB free, and "
                f"{', '.join(users)} would take {percent} %",
                "vLLM does not start where its share is not free",
                f"End what uses it (`nvidia-smi`), choose another with --devices, or lower {_UTILIZATION}",
            )


def _utilization(config: LaunchConfig, node: NodeProcess) -> float:
    text = given(config.arguments_of(node.role, node.name)).get(_UTILIZATION, "")
    try:
        return float(text)
    except ValueError:
        return _DEFAULT_UTILIZATION
