"""The machine: files, memory, disk."""

from collections.abc import Iterator

from engines.known import ENGINES

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import Plan
from .findings import Finding, error, warning

_LEAST_FILES = 1024
_ENOUGH_FILES = 8192
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  not ours to name
_LEAST_SHARED_MEMORY_MIB = 64
"""A node's: vLLM passes messages between its processes there."""
_FAR_TOO_LITTLE_MIB = 16
_NCCL_MIB = 256
"""... and NCCL its buffers, of each GPU of a node that has several."""
_LEAST_DISK_MIB = 1024
_NO_DISK_MIB = 1
_CPU_NODE_MIB = 3 * 1024
"""Resident, of a node on a CPU with a tiny model (CPU_ENGINE)."""


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    looked_at = (
        f"{facts.memory_available_mib / 1024:.0f} GiB of memory, {facts.run_dir_free_mib / 1024:.0f} GiB for logs"
    )
    return looked_at, _found(config, plan, facts)


def _found(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    yield from _of_logs(plan, facts)
    if ENGINES[config.engine].is_simulated:
        return
    if facts.open_files is not None and facts.open_files < _ENOUGH_FILES:
        tell = error if facts.open_files < _LEAST_FILES else warning
        why = "Every client is a socket in the proxy and one in a node"
        yield tell(f"at most {facts.open_files} files may be open (ulimit -n)", why, f"Raise it to {_ENOUGH_FILES}")
    yield from _of_shared_memory(plan, facts)
    needed = _CPU_NODE_MIB * len(plan.nodes)
    if config.device == "cpu" and facts.memory_available_mib < needed:
        yield warning(
            f"{facts.memory_available_mib / 1024:.1f} GiB of memory are available, {len(plan.nodes)} nodes on a CPU "
            f"take about {needed // 1024}",
            "A node that gets none is killed by the kernel, without a word in its log",
            "Start fewer nodes, or free memory",
        )


def _of_logs(plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    """Logs must have a place before there is something to log."""
    fix = "Choose another place with --run-dir"
    if facts.run_dir_problem:
        yield error(f"cannot make {plan.run_dir} for the logs: {facts.run_dir_problem}", "", fix)
    elif facts.run_dir_free_mib < _NO_DISK_MIB:
        yield error(f"no room for logs in {plan.run_dir}", "The disk is full", "Make room, or choose with --run-dir")
    elif facts.run_dir_free_mib < _LEAST_DISK_MIB:
        yield warning(f"{facts.run_dir_free_mib} MiB are free where the logs go", f"{plan.run_dir}", fix)


def _of_shared_memory(plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    of_nccl = sum(_NCCL_MIB * node.seat.tensor * node.seat.pipeline for node in plan.nodes if len(node.devices) > 1)
    needed = _LEAST_SHARED_MEMORY_MIB * len(plan.nodes) + of_nccl
    if facts.shared_memory_free_mib < needed:
        tell = error if facts.shared_memory_free_mib < _FAR_TOO_LITTLE_MIB * len(plan.nodes) else warning
        yield tell(
            f"{_SHARED_MEMORY} has {facts.shared_memory_free_mib} MiB free, the nodes need about {needed}",
            "A node's processes talk through it, and die of SIGBUS when it is full",
            "Make it larger (in a container: --shm-size), or remove what is left in it",
        )
