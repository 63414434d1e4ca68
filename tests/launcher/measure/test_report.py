"""What is told of a comparison, on the screen that there is."""

from pathlib import Path

import pytest
from rich.console import Console

from launcher.measure.arms import arms
from launcher.measure.compare import Found, Job, Round
from launcher.measure.report import Report
from launcher.measure.slo import Slo
from launcher.measure.stages import NAMES, Stages
from launcher.measure.traces import made
from launcher.plan.config import LaunchConfig
from tests.launcher.measure.test_results import rounds

ARMS = "1P4D,2P3D,3P2D,4P1D,5"


def report(folder: Path) -> Report:
    """Of five arms, three rounds each."""
    found = Found()
    for arm in arms(ARMS):
        found.rounds += [Round(arm, number, rounds(150 + 9 * number, 60)[0], spent()) for number in (1, 2, 3)]
    workload = made("input=300,output=20,rate=2", 210, 1)
    return Report(
        Job(LaunchConfig(model="tiny"), tuple(arms(ARMS)), workload, Slo(ttft=1.0, tpot=0.1), 3, folder), found
    )


def spent() -> Stages:
    load = {role: {"computing": 1.0, "waiting": 0.0, "kv_usage": 0.5} for role in ("prefill", "decode", "both")}
    return Stages(dict.fromkeys(NAMES, 0.5), load, 20_000)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_arms_that_do_not_fit_beside_each_other_stand_below_each_other(width: int, tmp_path: Path) -> None:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(report(tmp_path).shown())
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in captured.get()
    names = [str(arm) for arm in arms(ARMS)]
    heads = [line for line in lines if line.startswith(" ") and line.strip().startswith(tuple(names))]
    told = " ".join(heads)
    assert [told.count(name) for name in names] == [2] * 5
    assert (len(heads) == 2) == (width == 200)
    assert sum(line.startswith(("ttft p99", "the rest")) for line in lines) == len(heads)
