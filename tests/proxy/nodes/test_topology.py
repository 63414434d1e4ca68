"""The topology file, followed."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.topology import Topology
from proxy.nodes import topology
from proxy.nodes.fleet import Fleet
from proxy.nodes.node import Node
from proxy.nodes.topology import TopologyError, follow, read, write


def with_decode_nodes(*names: str) -> Topology:
    nodes = [{"name": name, "role": "decode", "url": f"http://{name}:1"} for name in names]
    return Topology.model_validate({"nodes": nodes})


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(topology, "_LOOK_EVERY_S", 0.005)
    return tmp_path / "topology.json"


def test_a_change_between_the_reading_and_the_following_is_not_lost(file: Path) -> None:
    """The first probe of a node that hangs takes seconds; pd-launch may write meanwhile."""
    write(file, with_decode_nodes("old"))
    nodes, applied = read(file)
    fleet = Fleet(nodes)
    write(file, with_decode_nodes("new"))
    probed: list[str] = []

    async def probe_all(newcomers: list[Node]) -> None:
        probed.extend(node.spec.name for node in newcomers)

    async def story() -> None:
        following = asyncio.create_task(follow(file, applied, fleet, probe_all))
        await until(lambda: [node.spec.name for node in fleet] == ["new"])
        following.cancel()

    asyncio.run(asyncio.wait_for(story(), 30))
    assert probed == ["new"]


def test_a_file_that_cannot_be_used_changes_nothing_and_the_next_one_counts(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(file, with_decode_nodes("a"))
    nodes, applied = read(file)
    fleet = Fleet(nodes)

    async def probe_all(newcomers: list[Node]) -> None:
        del newcomers

    def spoil() -> None:
        file.write_text('{"nodes": [{"name": "half')

    async def story() -> None:
        following = asyncio.create_task(follow(file, applied, fleet, probe_all))
        spoil()
        await until(lambda: "topology left as it was" in caplog.text)
        assert [node.spec.name for node in fleet] == ["a"]
        os.unlink(file)  # noqa: PTH108  no wait in a coroutine
        await until(lambda: "No such file" in caplog.text)
        write(file, with_decode_nodes("a", "b"))
        await until(lambda: len(list(fleet)) == 2)
        following.cancel()

    asyncio.run(asyncio.wait_for(story(), 30))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a topology"),
        ("[]", "is not a topology"),
        (
            json.dumps({"nodes": [{"name": "d", "role": "decode", "url": "https://d:1"}]}),
            "not of the form http://host:port",
        ),
        (json.dumps({"engine": "sglang"}), "engine"),
        (None, "cannot read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(file: Path, text: str | None, says: str) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(TopologyError, match=says):
        read(file)
