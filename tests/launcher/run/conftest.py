"""A stage, for stories of what happens to a run."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.plan import NodeProcess
from launcher.run import keeper as keeping
from launcher.run import readiness
from launcher.run.restarts import RestartPolicy
from tests.stage import AT_ONCE, Made, Play, Stage, Story


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a story on a stage with these flags. Nodes are ready as soon as they are started."""

    async def ready(child: Made, node: NodeProcess, timeout_s: float, begin: int) -> None:
        del child, node, timeout_s, begin

    async def no_news(lives: object) -> str:
        del lives
        return ""

    monkeypatch.setattr(readiness, "node_ready", ready)
    monkeypatch.setattr(keeping, "cause", no_news)

    def played(story: Story, policy: RestartPolicy = AT_ONCE, **flags: Any) -> None:
        async def whole() -> None:
            stage = Stage(tmp_path, flags, policy)
            await stage.begin()
            try:
                async with asyncio.timeout(60):
                    await story(stage)
            finally:
                await stage.keeper.close()

        asyncio.run(whole())

    return played
