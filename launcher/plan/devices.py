"""Which GPUs each node gets: from those that CUDA shows to programs started here, one a node unless told otherwise.

CUDA_VISIBLE_DEVICES of the launcher's own environment (Slurm sets it, and containers) says which those are, and their
order: `--devices 0` is the first of them, whatever its number is on the host.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from engines.base import NodeRole, Parallel

from ..errors import ConfigError
from .config import LaunchConfig, flag_of
from .facts import Gpu, HostFacts

_VISIBLE = "CUDA_VISIBLE_DEVICES"
Shares = dict[NodeRole, list[tuple[str, ...]]]
"""Of each role, the devices of one node after the other."""


def visible(facts: HostFacts) -> tuple[Gpu, ...]:
    """In CUDA's order. Like CUDA it stops at the first that is not there."""
    given = facts.environment.get(_VISIBLE)
    if given is None:
        return facts.gpus
    found = []
    for name in given.split(","):
        gpu = _named(name.strip(), facts.gpus)
        if gpu is None:
            break
        found.append(gpu)
    return tuple(found)


def parallel_of(config: LaunchConfig, role: NodeRole, devices: int | None = None) -> Parallel:
    """The sizes of a role's nodes; the tensor parallelism that none is given for is what `devices` leave for it.

    Raises ConfigError.
    """
    pipeline, data = config.pipeline_parallel.of(role) or 1, config.data_parallel.of(role) or 1
    tensor = config.tensor_parallel.of(role)
    if tensor is None:
        others = pipeline * data
        if devices and devices % others:
            raise ConfigError(
                f"a {role} node's {devices} GPUs cannot be shared out to {pipeline} pipeline stages and {data} engines",
                "Give --tensor-parallel, or other sizes",
            )
        tensor = devices // others if devices else 1
    return Parallel(tensor, pipeline, data)


def shares_of(config: LaunchConfig, facts: HostFacts) -> Shares:
    """Raises ConfigError when the GPUs there are do not suffice, or cannot be shared out."""
    numbers = config.numbers
    if config.device == "cpu":
        return {role: [()] * number for role, number in numbers.items()}
    if config.prefill_devices:
        return {role: _of_role(config, facts, role, number) if number else [] for role, number in numbers.items()}
    if config.devices and not _has_tensor(config):
        return _even(config, resolved(config.devices, facts), numbers)
    return _in_order(config, facts, numbers)


def left_over(
    config: LaunchConfig, facts: HostFacts, role: NodeRole, used: Sequence[str], needed: int
) -> tuple[str, ...]:
    """So many devices for one more node. Raises ConfigError."""
    if config.device == "cpu":
        return ()
    names = config.devices_of(role) or config.devices
    pool = list(resolved(names, facts)) if names else [gpu.id for gpu in _choosable(facts)]
    for device in used:
        if device in pool:
            pool.remove(device)
    if len(pool) < needed:
        every = ",".join(names) or f"{len(visible(facts))} GPUs here"
        raise ConfigError(
            f"no device is left for another {role} node: every one of {every} is in use",
            "Stop a node first, or start with more --devices",
        )
    return tuple(pool[:needed])


def resolved(names: Sequence[str], facts: HostFacts) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls them. Where no GPU is seen at all they are left as they are given.

    Raises ConfigError for one that is not here.
    """
    seen = visible(facts)
    return tuple(_resolved(name, seen, facts) for name in names) if facts.gpus else tuple(names)


def _resolved(name: str, seen: Sequence[Gpu], facts: HostFacts) -> str:
    if name.isdigit():
        if int(name) < len(seen):
            return seen[int(name)].id
    else:
        gpu = _named(name, seen)
        if gpu is not None:
            return gpu.id
    given = facts.environment.get(_VISIBLE)
    within = f" ({_VISIBLE}={given} of this shell leaves these)" if given is not None else ""
    listed = ", ".join(f"{place}: {gpu.uuid or gpu.name}" for place, gpu in enumerate(seen)) or "none"
    raise ConfigError(f"--devices {name}: no such GPU here", f"Here are{within}: {listed}")


def _named(name: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """By its number on the host, its UUID, or a beginning of that which no other has."""
    if name.isdigit():
        return next((gpu for gpu in gpus if gpu.id == name), None)
    found = [gpu for gpu in gpus if name and gpu.uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def _choosable(facts: HostFacts) -> list[Gpu]:
    """Those that no other launcher keeps."""
    return [gpu for gpu in visible(facts) if gpu.uuid not in facts.locked_gpus]


def _has_tensor(config: LaunchConfig) -> bool:
    return any(config.tensor_parallel.of(role) for role in NodeRole)


def _of_role(config: LaunchConfig, facts: HostFacts, role: NodeRole, number: int) -> list[tuple[str, ...]]:
    devices = resolved(config.devices_of(role), facts)
    flag = flag_of(f"{role}_devices")
    if len(devices) % number:
        raise ConfigError(
            f"{flag} {','.join(devices)}: {len(devices)} GPUs cannot be shared out evenly to {number} {role} nodes",
            "Name as many for each node; name one twice to put two nodes on it",
        )
    share = len(devices) // number
    needed = parallel_of(config, role, share).workers
    if needed != share:
        raise ConfigError(f"{flag} gives a {role} node {share} GPUs, and its parallel sizes need {needed}")
    return _each_once(_cut(devices, [share] * number))


def _even(config: LaunchConfig, devices: Sequence[str], numbers: dict[NodeRole, int]) -> Shares:
    nodes = sum(numbers.values())
    if len(devices) % nodes:
        raise ConfigError(
            f"--devices {','.join(devices)}: {len(devices)} devices cannot be shared out evenly to {nodes} nodes",
            "Name one (or two, four ...) for each node, or use --prefill-devices and --decode-devices, or "
            "--tensor-parallel prefill=…,decode=…; name one twice to put two nodes on it",
        )
    share = len(devices) // nodes
    for role in numbers:
        parallel_of(config, role, share)
    return _by_role(_each_once(_cut(devices, [share] * nodes)), numbers)


def _in_order(config: LaunchConfig, facts: HostFacts, numbers: dict[NodeRole, int]) -> Shares:
    """As many as each node's sizes need, one after the other."""
    sizes = [parallel_of(config, role).workers for role, number in numbers.items() for _ in range(number)]
    needed = sum(sizes)
    if config.devices:
        devices = list(resolved(config.devices, facts))
    elif facts.gpus:
        devices = [gpu.id for gpu in _choosable(facts)]
    else:  # nobody knows: a plan for another host, or a check that will say so
        devices = [str(number) for number in range(needed)]
    if len(devices) < needed:
        kept = f" ({len(facts.locked_gpus)} are kept by another pd-launch)" if facts.locked_gpus else ""
        here = f"--devices names {len(devices)}" if config.devices else f"{len(devices)} can be used here{kept}"
        raise ConfigError(
            f"{config.nodes_in_words} need {needed} GPUs, and {here}",
            "Start fewer nodes, or smaller ones; name one twice with --devices to put two nodes on it",
        )
    return _by_role(_each_once(_cut(devices, sizes)), numbers)


def _by_role(shares: list[tuple[str, ...]], numbers: dict[NodeRole, int]) -> Shares:
    rest = iter(shares)
    return {role: list(islice(rest, number)) for role, number in numbers.items()}


def _each_once(shares: Iterator[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Raises ConfigError for a node that would have one GPU twice."""
    found = list(shares)
    for own in found:
        if len(set(own)) < len(own):
            raise ConfigError(f"GPU {own[0]} would be given to one node twice", "Name each GPU of a node once")
    return found


def _cut(devices: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[str, ...]]:
    begin = 0
    for size in sizes:
        yield tuple(devices[begin : begin + size])
        begin += size
