"""What a run is asked to change, done or broken off half-way: what is left is whole."""

import asyncio
from pathlib import Path

import pytest

from launcher.errors import LauncherError
from launcher.plan.plan import NodeProcess, Process
from launcher.run import readiness
from tests.stage import Made, Play, Stage

NODES = ["prefill-0", "decode-0"]


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing serves, so nothing has to be waited for."""

    async def idle(self: object, node: object) -> None:
        del self, node

    monkeypatch.setattr("launcher.run.changes.Changes._until_idle", idle)


def test_a_node_is_started_again_when_it_is_asked_for_and_then_kept_as_before(play: Play) -> None:
    async def story(stage: Stage) -> None:
        await stage.ask(do="restart", node="decode-0")
        assert stage.states()["decode-0"] == "ready"
        assert not stage.fleet.draining
        stage.place.latest("decode-0").end()
        while len(stage.place.started) < 4:
            await asyncio.sleep(0)

    play(story)


def test_a_restart_that_is_broken_off_while_the_node_is_being_stopped_leaves_a_node_that_is_started_again(
    play: Play,
) -> None:
    async def story(stage: Stage) -> None:
        asked = asyncio.create_task(stage.ask(do="restart", node="decode-0"))
        await stage.until("Stopping decode-0.")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await stage.until("decode-0 is ready again.")
        assert stage.states() == {"prefill-0": "ready", "decode-0": "ready"}
        assert not stage.fleet.draining

    play(story)


def test_a_removal_that_is_broken_off_half_way_is_finished(play: Play) -> None:
    """A node that is being stopped cannot come back; one of which half is gone helps nobody."""

    async def story(stage: Stage) -> None:
        asked = asyncio.create_task(stage.ask(do="scale", prefill=None, decode=1))
        await stage.until("Stopping decode-1.")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert list(stage.states()) == NODES
        assert stage.topologies[-1] == NODES

    play(story, decode=2)


def test_a_node_that_drains_when_its_removal_is_broken_off_goes_on_as_before(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(self: object, node: object) -> None:
        del self, node
        await asyncio.Event().wait()

    monkeypatch.setattr("launcher.run.changes.Changes._until_idle", busy)

    async def story(stage: Stage) -> None:
        asked = asyncio.create_task(stage.ask(do="scale", prefill=None, decode=1))
        await stage.until("Draining decode-1")
        assert stage.fleet.draining == {"decode-1"}
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not stage.fleet.draining
        assert stage.states()["decode-1"] == "ready"
        stage.place.latest("decode-1").end()
        await stage.until("decode-1 is ready again.")

    play(story, decode=2)


def test_nobody_is_told_of_a_new_node_before_it_is_ready(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(stage: Stage) -> None:
        is_ready = asyncio.Event()

        async def later(child: Made, node: NodeProcess, timeout_s: float, begin: int) -> None:
            del child, timeout_s, begin
            if node.name == "decode-1":
                await is_ready.wait()

        monkeypatch.setattr(readiness, "node_ready", later)
        asked = asyncio.create_task(stage.ask(do="scale", prefill=None, decode=2))
        await stage.until("Starting decode-1")
        stage.place.latest("prefill-0").end()  # the proxy is told that it has come back
        await stage.until("prefill-0 is ready again.")
        assert stage.topologies[-1] == NODES
        is_ready.set()
        await asked
        assert stage.topologies[-1] == [*NODES, "decode-1"]

    play(story)


def test_of_nodes_that_are_added_all_come_or_none(play: Play) -> None:
    async def story(stage: Stage) -> None:
        usual = stage.place.start

        async def start(spec: Process, run_id: str, folder: Path) -> Made:
            child = await usual(spec, run_id, folder)
            if spec.name == "decode-2":
                child.end()
                raise LauncherError("cannot start decode-2")
            return child

        stage.place.start = start  # type: ignore[method-assign]
        with pytest.raises(LauncherError, match="cannot start decode-2"):
            await stage.ask(do="scale", prefill=None, decode=3)
        assert list(stage.states()) == NODES
        assert stage.topologies[-1] == NODES
        assert [node.name for node in stage.fleet.plan.nodes] == NODES

    play(story)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ({"do": "restart", "node": "decode-7"}, "no node 'decode-7' to start again"),
        ({"do": "scale", "prefill": 0, "decode": None}, "at least one prefill node"),
        ({"do": "scale", "prefill": True, "decode": None}, "unknown command"),
        ({"do": "dance"}, "unknown command"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(play: Play, command: dict[str, object], says: str) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(LauncherError, match=says):
            await stage.asked(command, lambda _: None)
        assert list(stage.states()) == NODES
        assert stage.changes == 0

    play(story)
