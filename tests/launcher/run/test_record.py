"""What a run writes down for the proxy, beside what others change in the same file."""

from collections.abc import Collection
from pathlib import Path

from engines.topology import Node, Topology
from launcher.inspect.runs import RunFolder
from launcher.plan.config import LaunchConfig
from launcher.run.record import Record


def nodes(drained: Collection[str]) -> Topology:
    names = ("d0", "d1", "d2")
    made = [
        Node(name=name, role="decode", url=f"http://h:{port}", drain=name in drained)
        for port, name in enumerate(names, 1)
    ]
    return Topology(nodes=tuple(made))


def drained(file: Path) -> set[str]:
    return {node.name for node in Topology.model_validate_json(file.read_bytes()).nodes if node.drain}


def by_others(file: Path, *names: str) -> None:
    """As the proxy's admin listener does it."""
    file.write_text(nodes(names).model_dump_json())


def test_what_others_drain_stays_drained_until_they_take_it_back(tmp_path: Path) -> None:
    file, own = tmp_path / "topology.json", {"d0"}
    record = Record(RunFolder(tmp_path), LaunchConfig(model="tiny"), {})

    def write() -> set[str]:
        record.topology(file, lambda others: nodes({*own, *others}))
        return drained(file)

    assert write() == {"d0"}
    by_others(file, "d0", "d1")
    assert write() == {"d0", "d1"}
    own.clear()
    assert write() == {"d1"}, "the launcher takes back its own only"
    by_others(file)
    assert write() == set()
    by_others(file, "d2")
    own.add("d2")
    assert write() == {"d2"}
    own.clear()
    assert write() == {"d2"}, "both had drained it"


def test_a_file_that_is_none_is_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    file.write_text("{")
    record = Record(RunFolder(tmp_path), LaunchConfig(model="tiny"), {})
    record.topology(file, nodes)
    assert drained(file) == set()
