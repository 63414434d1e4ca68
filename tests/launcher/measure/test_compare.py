"""Comparisons whose right answer is known: simulated nodes, as fast or slow as they are told to be."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.sim.timing import Speeds
from launcher.errors import ConfigError, LauncherError
from launcher.events.events import Events
from launcher.hosts.local.host import LocalHost
from launcher.measure import compare, load, starting, traces
from launcher.measure.arms import Arm
from launcher.measure.compare import Comparison, Job
from launcher.measure.loadgen import Planned, Row
from launcher.measure.report import Report
from launcher.measure.slo import Slo
from launcher.plan.config import LaunchConfig
from tests.processes import free_port, free_range

pytestmark = pytest.mark.timeout(600)
PAIR, ALIKE = Arm(prefill=1, decode=1), Arm(ordinary=2)
USUAL = Speeds(
    prefill_s=0.005, prefill_token_s=0.0002, decode_s=0.01, decode_sequence_s=0.0005, hand_off_s=0.005,
    hand_off_token_s=2e-6,
)  # fmt: skip


def speeds(**other: float) -> tuple[str, str]:
    return "--speeds", USUAL.model_copy(update=other).model_dump_json()


def config(args: tuple[str, ...] = (), **further: Any) -> LaunchConfig:
    first, last = free_range(4).split("-")
    bootstrap = free_range(4)
    ports = {"http_ports": f"{first}-{last}", "bootstrap_ports": bootstrap, "proxy_port": free_port()}
    given = {"engine": "sim", "model": "tiny", "args": list(args or speeds()), "max_model_len": 100_000}
    return LaunchConfig.model_validate(given | ports | further)


def job(folder: Path, slo: str, *arms: Arm, workload: str = "input=600,output=16,rate=7", **further: Any) -> Job:
    requests = further.pop("requests", 50)
    made = traces.made(workload, requests, seed=1)
    base = further.pop("base", None) or config(**further)
    found = Job(base, arms, made, Slo.parse(slo), 1, folder)
    compare.begin(found, resume=False)
    return found


def carried_out(wanted: Job, told: Callable[[Any], None] = lambda _: None) -> Report:
    found = asyncio.run(Comparison(wanted, LocalHost(), Events(told)).run())
    return Report(wanted, found)


def test_pairs_win_where_prompts_would_delay_the_tokens_of_others(tmp_path: Path) -> None:
    report = carried_out(job(tmp_path / "run", "ttft=2s,tpot=22ms", PAIR, ALIKE))
    assert report.verdict is not None
    assert (report.verdict.best, report.verdict.is_difference) == ("1P1D", True)


def test_ordinary_nodes_win_where_prefill_is_all_the_work(tmp_path: Path) -> None:
    wanted = job(tmp_path / "run", "ttft=400ms,tpot=200ms", PAIR, ALIKE, workload="input=800,output=4,rate=10")
    report = carried_out(wanted)
    assert report.verdict is not None
    assert (report.verdict.best, report.verdict.is_difference) == ("2 ordinary", True)
    assert report.binding_of(PAIR) == "prefill"
    assert "it needs another prefill node" in report.told_of(PAIR)


def test_where_both_have_time_enough_there_is_no_difference(tmp_path: Path) -> None:
    wanted = job(tmp_path / "run", "ttft=5s,tpot=500ms", PAIR, ALIKE, workload="input=100,output=8,rate=10")
    report = carried_out(wanted)
    assert report.verdict is not None
    assert not report.verdict.is_difference
    assert report.sentence().startswith("No difference between")


@pytest.mark.parametrize(
    ("what", "binds"),
    [
        ({"prefill_args": list(speeds(prefill_token_s=0.0004))}, "prefill"),
        ({"decode_args": list(speeds(decode_s=0.08))}, "decode"),
        ({"decode_args": list(speeds(hand_off_s=0.8))}, "transfer"),
        ({"proxy_args": ["--max-in-flight", "1", "--queue-timeout-s", "60"]}, "proxy"),
    ],
    ids=["prefill", "decode", "transfer", "proxy"],
)
def test_the_one_part_that_is_slow_is_named(tmp_path: Path, what: dict[str, Any], binds: str) -> None:
    wanted = job(tmp_path / "run", "ttft=300ms,tpot=50ms", PAIR, workload="input=300,output=16,rate=8", **what)
    assert carried_out(wanted).binding_of(PAIR) == binds


def test_pairs_whose_kv_does_not_move_are_void(tmp_path: Path) -> None:
    lost = ["--faults", '{"lose_transfers": true}']
    wanted = job(tmp_path / "run", "ttft=2s,tpot=50ms", PAIR, decode_args=lost, keep=True)
    report = carried_out(wanted)
    assert report.found.is_void(PAIR)
    assert report.verdict is None
    assert report.told_of(PAIR).startswith("void")
    assert "VOID" in report.text()


def test_an_arm_whose_node_dies_twice_has_failed_and_the_other_goes_on(tmp_path: Path) -> None:
    dies = ["--faults", '{"fault": "exit-after", "chunks": 20}']  # the proof's answer is shorter
    wanted = job(
        tmp_path / "run", "ttft=2s,tpot=50ms", PAIR, ALIKE, workload="input=100,output=60,rate=6", requests=30,
        prefill_args=["--faults", "{}"], decode_args=dies,
    )  # fmt: skip
    told: list[str] = []
    report = carried_out(wanted, lambda event: told.append(event.text))
    assert PAIR in report.found.failed
    assert "decode-0" in report.found.failed[PAIR]
    assert [text for text in told if "once more" in text]
    assert report.told_of(PAIR).startswith("failed: ")


def test_what_was_interrupted_goes_on_with_the_rounds_that_are_missing(tmp_path: Path) -> None:
    wanted = job(tmp_path / "run", "ttft=5s,tpot=500ms", ALIKE, workload="input=50,output=4,rate=20")
    first = asyncio.run(Comparison(wanted, LocalHost(), Events()).run())
    file = wanted.folder / "rounds" / "2-1.jsonl"
    kept = file.read_text()
    compare.begin(wanted, resume=True)
    again = carried_out(wanted)
    assert file.read_text() == kept, "it was not played again"
    assert [one.rows for one in again.found.rounds] == [one.rows for one in first.rounds]
    assert again.found.held == first.held != {}
    file.write_text(kept[: len(kept) // 2])
    assert compare.read(wanted, ALIKE, 1) is None


def test_another_comparison_is_not_gone_on_with(tmp_path: Path) -> None:
    wanted = job(tmp_path / "run", "ttft=5s", ALIKE, PAIR)
    other = Job(wanted.base, wanted.arms, wanted.workload, Slo(ttft=1), 1, wanted.folder)
    with pytest.raises(ConfigError, match="its slo were others"):
        compare.begin(other, resume=True)
    with pytest.raises(ConfigError, match="holds a comparison already"):
        compare.begin(wanted, resume=False)
    with pytest.raises(ConfigError, match="holds no comparison"):
        compare.begin(Job(wanted.base, wanted.arms, wanted.workload, wanted.slo, 1, tmp_path), resume=True)


def test_arms_take_turns_forwards_and_backwards(tmp_path: Path) -> None:
    wanted = Job(config(), (PAIR, ALIKE), traces.made("conversations", 5, 1), Slo(ttft=1), 3, tmp_path)
    assert [(str(arm), number) for arm, number in wanted.order] == [
        ("1P1D", 1), ("2 ordinary", 1), ("2 ordinary", 2), ("1P1D", 2), ("1P1D", 3), ("2 ordinary", 3),
    ]  # fmt: skip


def test_what_is_longer_than_the_model_takes_is_named() -> None:
    made = traces.made("input=600,output=20,rate=5", 10, seed=1)
    starting.refuse_longer(made, 620)
    with pytest.raises(ConfigError, match=r"request 1 has 600 \+ 20 tokens, and the model takes 619") as refused:
        starting.refuse_longer(made, 619)
    assert "--scale 0.9" in refused.value.hint


def test_requests_that_nobody_answers_are_errors_of_the_round() -> None:
    plan: list[Planned] = [(number, 0.1, {"prompt": "x"}, {}) for number in range(3)]
    rows = asyncio.run(load.run(f"http://127.0.0.1:{free_port()}", {}, iter(plan)))
    assert [bool(row.problem) for row in rows] == [True] * 3


def test_a_load_generator_that_was_the_bottleneck_is_no_measure() -> None:
    async def read(*lines: object) -> list[Row]:
        output = asyncio.StreamReader()
        output.feed_data("".join(json.dumps(line) + "\n" for line in lines).encode())
        output.feed_eof()
        return await load._rows(output, lambda _: None)

    row = {"number": 0, "due": 1.0}
    assert asyncio.run(read(row, {"cpu": 7, "wall": 10})) == [Row(0, 1.0)]
    with pytest.raises(load.TooSlowError, match="it used 90% of a core"):
        asyncio.run(read(row, {"cpu": 9, "wall": 10}))
    with pytest.raises(LauncherError, match="ended before its requests did"):
        asyncio.run(read(row))
