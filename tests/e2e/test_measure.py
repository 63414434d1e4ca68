"""What `compare` and `size` rest on, on real nodes: their counters, their tokens, and the load generator's reading."""

import asyncio
from statistics import fmean

import httpx
import pytest

from launcher.hosts.local.host import LocalHost
from launcher.measure import load, stages, traces
from launcher.measure.loadgen import Row
from launcher.measure.results import e2e
from launcher.measure.starting import vocabulary_of
from launcher.plan.lockfile import LockFile
from launcher.plan.plan import Plan
from launcher.plan.planner import make_plan
from tests.launched import Up

pytestmark = pytest.mark.timeout(600)
REQUESTS, PROMPT, OUTPUT = 12, 60, 8
A_TICK = 0.01
"""Seconds: an event loop's timers may be early by its clock's resolution."""


def plan_of(run: Up) -> Plan:
    lock = LockFile.read(run.run_dir / "lock.json")
    facts = LocalHost().facts(lock.config).model_copy(update={"taken": {}})  # by the run itself
    return make_plan(lock.config, facts, lock.seats)


def test_a_round_is_measured_by_what_the_nodes_count(real_pair: Up) -> None:
    plan = plan_of(real_pair).model_copy(update={"proxy_url": real_pair.url})
    workload = traces.made(f"input={PROMPT},output={OUTPUT},rate=2", REQUESTS, seed=1)

    async def play() -> tuple[list[Row], stages.Stages]:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            vocabulary = await vocabulary_of(client, plan)
        bodies = load.planned(workload, plan.served_model_name, vocabulary, draw=1)
        rows, before, after, looks = await stages.watched(plan, load.run(plan.proxy_url, {}, bodies, wants_times=True))
        return rows, stages.stages(plan, rows, before, after, looks)

    rows, found = asyncio.run(play())
    assert [row.problem for row in rows] == [""] * REQUESTS
    assert {(row.prompt_tokens, row.output_tokens, row.path) for row in rows} == {(PROMPT, OUTPUT, "disaggregated")}
    assert all(row.due - A_TICK < row.sent < row.first <= row.last <= row.ended for row in rows)
    assert all(row.times[-1][0] == row.last for row in rows)
    assert found.transferred == REQUESTS * PROMPT
    assert set(found.seconds) == set(stages.NAMES) - {"queue"}
    assert found.seconds["prefill"] > 0
    assert found.seconds["decode"] > 0
    assert sum(found.seconds.values()) == pytest.approx(fmean(map(e2e, rows)), rel=0.2)
    assert set(found.load) == {"prefill", "decode"}
    assert found.load["prefill"]["computing"] > 0
