"""What a host is like, as data: gathered by the host (`hosts/`), read by plans and checks, which look nowhere else.

`pd-launch facts --json` shows it, and `plan` and `check` take it with `--facts`, for a host that is not this one.
"""

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from .secrets import shown_value

APPLICATION: Final = "pd-launch"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(Frozen):
    """One that CUDA could use, a MIG device included."""

    id: str
    """What CUDA_VISIBLE_DEVICES calls it: its number by the PCI bus, which is NVML's, or a MIG device's UUID."""
    uuid: str
    name: str = ""
    memory_mib: int = 0
    free_mib: int = 0
    capability: str = ""
    """Of its architecture, like 9.0."""
    numa_node: int | None = None
    is_mig: bool = False

    @property
    def number(self) -> str:
        """For people."""
        return self.uuid if self.is_mig else self.id


class RdmaAdapter(Frozen):
    """One in /sys/class/infiniband."""

    name: str
    has_active_port: bool = False
    driver: str = ""
    link_layer: str = ""
    numa_node: int | None = None

    @property
    def is_efa(self) -> bool:
        """AWS' own: it has no reliable connected queue pairs, which Mooncake's RDMA transport makes."""
        return self.driver == "efa" or self.name.startswith(("efa", "rdmap"))


class EngineFacts(Frozen):
    """The environment the engines run in."""

    python: str
    versions: dict[str, str] = {}
    """Of vllm's and Mooncake's packages."""
    has_store_master: bool = False
    problem: str = ""
    """Why no engine can run there, and what helps."""
    remedy: str = ""


class ModelFacts(Frozen):
    """A model that lies in a folder here."""

    path: Path | None = None
    exists: bool = False
    is_folder: bool = False
    has_config: bool = False
    attention_heads: int | None = None
    kv_heads: int | None = None


class HostFacts(Frozen):
    """Of the machine, its environment and what is installed."""

    name: str = ""
    resolves_to: str | None = None
    """The address of the host's own name; None when it has none."""
    addresses: dict[str, str] = {}
    """Of each name that the configuration gives, its IPv4 address; "" when it has none."""
    interface: str = ""
    """The network interface that has the address the nodes bind."""
    unusable: dict[str, str] = {}
    """Addresses that nothing here can bind, and why not."""

    memory_available_mib: int = 0
    """Within the limits of a container, too."""
    shared_memory_free_mib: int = 0
    open_files: int | None = None
    """How many may be open; None when there is no limit."""
    locked_memory_kib: int | None = None
    """How much may be locked; None when there is no limit, or none for us (CAP_IPC_LOCK)."""

    run_dir_problem: str = ""
    """Why logs cannot be written there."""
    run_dir_free_mib: int = 0

    ephemeral_ports: tuple[int, int] = (32768, 60999)
    """The kernel's range for outgoing connections, both ends included."""
    reserved_ports: tuple[tuple[int, int], ...] = ()
    """Those in it that the kernel leaves alone."""
    taken: dict[int, str] = {}
    """Ports that cannot be had, and who has them, in words."""

    gpus: tuple[Gpu, ...] = ()
    """All of the host's that are passed in, in the order of the PCI bus."""
    gpu_problem: str = ""
    """Why none is seen."""
    driver: str = ""
    locked_gpus: dict[str, str] = {}
    """UUID -> who has it: GPUs that other launchers keep."""

    rdma: tuple[RdmaAdapter, ...] = ()
    has_uverbs: bool = False
    """/dev/infiniband/uverbs*: by which a program uses an adapter."""

    environment: dict[str, str] = {}
    """The launcher's own: what children may inherit, and what checks look at."""

    our_python: str
    engine: EngineFacts
    relative_paths: tuple[str, ...] = ()
    """Words of flags and variables that are a path from where the launcher was started; its children run elsewhere."""
    proxy_problem: str = ""
    """What the proxy says of the flags it is given; empty when it takes them."""
    model: ModelFacts = ModelFacts()
    tiny_model: Path
    plugins: Path
    """Folder of the modules an engine loads."""
    new_run_dir: Path
    temporary: Path

    def without_secrets(self) -> "HostFacts":
        """To be shown and passed on."""
        shown = {name: shown_value(name, text) for name, text in self.environment.items()}
        return self.model_copy(update={"environment": shown})

    @property
    def no_proxy(self) -> tuple[str, ...]:
        """What the user keeps from an HTTP proxy."""
        given = self.environment.get("no_proxy") or self.environment.get("NO_PROXY") or ""
        return tuple(host.strip() for host in given.split(",") if host.strip())


_LEAST_LOCKED_KIB = 2**20
"""Less than any KV cache."""


def rdma_problem(facts: HostFacts) -> str:
    """Why KV cannot move over RDMA here; empty when it can. Mooncake would go back to TCP without a word."""
    if not facts.rdma:
        return "no RDMA adapter is here (/sys/class/infiniband is empty)"
    usable = [adapter for adapter in facts.rdma if not adapter.is_efa]
    if not usable:
        return f"{facts.rdma[0].name} is an EFA adapter, which has no queue pairs of the kind that Mooncake makes"
    if not any(adapter.has_active_port for adapter in usable):
        return f"no port of {', '.join(adapter.name for adapter in usable)} is ACTIVE"
    if not facts.has_uverbs:
        return "an adapter is seen in /sys, and /dev/infiniband/uverbs* is not there to use it by"
    if facts.locked_memory_kib is not None and facts.locked_memory_kib < _LEAST_LOCKED_KIB:
        return f"only {facts.locked_memory_kib} KiB may be locked (ulimit -l), and RDMA locks the whole KV cache"
    return ""


def rdma_remedy(facts: HostFacts) -> str:
    if not facts.has_uverbs and facts.rdma:
        return "Pass /dev/infiniband into the container"
    if facts.locked_memory_kib is not None and facts.locked_memory_kib < _LEAST_LOCKED_KIB and facts.rdma:
        return "ulimit -l unlimited (in a container: --ulimit memlock=-1)"
    return "Check the adapter (`ibv_devinfo`)"
