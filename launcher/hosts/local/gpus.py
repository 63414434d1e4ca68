"""The GPUs that are passed in here, from NVML: what `nvidia-smi` says, in WSL2 and in containers too."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...plan.facts import Gpu

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Found:
    """All of them, or why there are none."""

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    driver: str = ""


def find() -> Found:
    """Never raises: what is wrong is said in `problem`."""
    import pynvml  # noqa: PLC0415  only where GPUs are wanted

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        return Found(problem=f"NVML, the driver's library, says: {exc}")
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        number_of_gpus = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as exc:
        return Found(problem=f"NVML, the driver's library, says: {exc}")
    else:
        return _seen(pynvml, number_of_gpus, driver)
    finally:
        pynvml.nvmlShutdown()


def _seen(pynvml: Any, number_of_gpus: int, driver: str) -> Found:
    """One that is lost takes none of the others away."""
    gpus: list[Gpu] = []
    problem = "the driver is here, and no GPU is passed in"
    for number in range(number_of_gpus):
        try:
            gpus += _of(pynvml, number)
        except pynvml.NVMLError as exc:
            problem = f"NVML, the driver's library, says of GPU {number}: {exc}"
    return Found(tuple(gpus), "" if gpus else problem, driver)


def _of(pynvml: Any, number: int) -> Iterator[Gpu]:
    """The GPU, or, where it is cut up, its MIG devices: the whole cannot be used then."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    is_cut = _is_cut(pynvml, handle)
    for one in _mig_handles(pynvml, handle) if is_cut else [handle]:
        uuid = _text(pynvml.nvmlDeviceGetUUID(one))
        total, free = _memory(pynvml, one)
        yield Gpu(
            id=uuid if is_cut else str(number),
            uuid=uuid,
            name=_name(pynvml, one),
            memory_mib=total // _MIB,
            free_mib=free // _MIB,
            capability=_capability(pynvml, handle),
            numa_node=_numa_node(pynvml, handle),
            is_mig=is_cut,
        )


def _is_cut(pynvml: Any, handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:  # it cannot be cut up
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _mig_handles(pynvml: Any, handle: Any) -> Iterator[Any]:
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except pynvml.NVMLError_NotFound:
            continue


def _memory(pynvml: Any, handle: Any) -> tuple[int, int]:
    """(all, free) bytes; zeros where they are not told: of a GPU that shares the host's memory."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return 0, 0
    return memory.total, memory.free


def _name(pynvml: Any, handle: Any) -> str:
    try:
        return _text(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError:
        return ""


def _capability(pynvml: Any, handle: Any) -> str:
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return ""
    return f"{major}.{minor}"


def _numa_node(pynvml: Any, handle: Any) -> int | None:
    """From the PCI device: -1 there means that the machine has one node only."""
    try:
        bus = _text(pynvml.nvmlDeviceGetPciInfo(handle).busId).lower()
        node = int(Path(f"/sys/bus/pci/devices/{bus[-12:]}/numa_node").read_text())
    except (pynvml.NVMLError, OSError, ValueError):
        return None
    return node if node >= 0 else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
