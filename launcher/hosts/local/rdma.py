"""RDMA adapters, from /sys: a container sees them there also when they were not passed in."""

from pathlib import Path

from ...plan.facts import RdmaAdapter

_CLASS = Path("/sys/class/infiniband")
_VERBS = Path("/dev/infiniband")


def adapters() -> tuple[RdmaAdapter, ...]:
    return tuple(_adapter(folder) for folder in sorted(_CLASS.glob("*")))


def has_uverbs() -> bool:
    """Whether a program here can use an adapter at all."""
    return any(_VERBS.glob("uverbs*"))


def _adapter(folder: Path) -> RdmaAdapter:
    ports = sorted((folder / "ports").glob("*"))
    driver = folder / "device" / "driver"
    node = _read(folder / "device" / "numa_node")
    return RdmaAdapter(
        name=folder.name,
        has_active_port=any("ACTIVE" in _read(port / "state") for port in ports),
        driver=driver.resolve().name if driver.exists() else "",
        link_layer=_read(ports[0] / "link_layer") if ports else "",
        numa_node=int(node) if node.isdigit() else None,
    )


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
