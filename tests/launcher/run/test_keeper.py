"""What ends is started again, on a host that is made up."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engines.base import Gauges
from launcher.errors import LauncherError
from launcher.plan.plan import Process
from launcher.run import keeper as keeping
from tests.stage import AT_ONCE, Made, Play, Stage


def test_a_node_that_ends_is_started_again_and_the_proxy_is_told(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.place.latest("decode-0").end(-9)
        await stage.until("decode-0 is ready again.")
        assert stage.states() == {"prefill-0": "ready", "decode-0": "ready"}
        assert stage.changes == 2, "of its end, and of its return"
        (death,) = stage.fleet.lives["decode-0"].described(draining=False).deaths
        assert death.how == "killed by SIGKILL"

    play(story)


def test_ends_and_starts_that_failed_are_told_apart(play: Play) -> None:
    """It ended once; then its port was taken, three times."""

    async def story(stage: Stage) -> None:
        stage.place.busy = "api port 8101 is taken by pid 7"
        stage.place.latest("decode-1").end()
        await stage.until("Going on without it.")
        told = "\n".join(event.text for event in stage.told)
        assert told.count("decode-1 ended: exit code 1") == 1
        assert "decode-1 could not be started: api port 8101 is taken by pid 7" in told
        assert "It could not be started 3 times." in told
        assert "It has ended" not in told
        assert stage.states()["decode-1"] == "given up"
        assert not stage.keeper.failed.done()

    play(story, decode=2)


def test_a_node_that_keeps_ending_is_given_up_and_without_the_last_of_a_role_the_run_fails(
    play: Play,
) -> None:
    async def story(stage: Stage) -> None:
        for number in range(4):
            while len([child for child in stage.place.started if child.spec.name == "decode-0"]) <= number:
                await asyncio.sleep(0)
            stage.place.latest("decode-0").end()
        with pytest.raises(LauncherError, match=r"decode-0 ended: exit code 1\nIt has ended 4 times\."):
            await stage.keeper.failed

    play(story)


def test_a_node_that_was_well_for_long_has_made_up_for_what_was_before(play: Play) -> None:
    """However long its starts take."""

    async def story(stage: Stage) -> None:
        for number in range(3 * stage.policy.most_failures):
            while stage.states()["decode-0"] != "ready" or len(stage.place.started) < number + 2:
                await asyncio.sleep(0)
            stage.place.latest("decode-0").end()
        await stage.until("decode-0 is ready again.")
        assert not stage.keeper.failed.done()

    play(story, policy=replace(AT_ONCE, steady_s=0))


def test_without_restarts_the_first_end_is_the_last(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.place.latest("prefill-1").end()
        await stage.until("Going on without it.")
        assert len(stage.place.started) == 3

    play(story, prefill=2, restart=False)


def test_a_start_for_which_there_are_no_more_files_is_tried_again(play: Play) -> None:
    async def story(stage: Stage) -> None:
        usual = stage.place.start

        async def no_files(spec: Process, run_id: str, folder: Path) -> Made:
            del spec, run_id, folder
            stage.place.start = usual  # type: ignore[method-assign]
            raise OSError(24, "Too many open files")

        stage.place.start = no_files  # type: ignore[method-assign]
        stage.place.latest("decode-0").end()
        await stage.until("decode-0 could not be started: Too many open files")
        await stage.until("decode-0 is ready again.")

    play(story)


def test_a_node_that_is_left_alone_is_not_started_again(play: Play) -> None:
    async def story(stage: Stage) -> None:
        life = stage.fleet.lives["decode-0"]
        await stage.keeper.leave_alone(life)
        stage.place.latest("decode-0").end()
        await asyncio.sleep(0.01)
        assert len(stage.place.started) == 2
        stage.keeper.keep(life, LauncherError("it was stopped"))
        await stage.until("decode-0 is ready again.")

    play(story)


@pytest.mark.parametrize("restart_hung", [False, True])
def test_a_node_that_hangs_is_said_to_and_started_again_if_asked_for(
    play: Play, monkeypatch: pytest.MonkeyPatch, restart_hung: bool
) -> None:
    answers: list[Gauges | None] = [None]

    async def gauges(client: object, life: object) -> Gauges | None:
        del client, life
        return answers[0]

    monkeypatch.setattr(keeping, "_gauges", gauges)

    async def story(stage: Stage) -> None:
        await stage.until("decode-0 is hung: it has answered nothing for")
        if restart_hung:
            answers[0] = Gauges()
            await stage.until("decode-0 is ready again.")
            return
        assert stage.states()["decode-0"] == "hung"
        answers[0] = Gauges()
        await stage.until("decode-0 works again.")
        assert stage.states()["decode-0"] == "ready"

    play(story, restart_hung=restart_hung, hung_after_s=0.02)
