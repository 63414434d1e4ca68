"""Constants of a measured pair, and how many nodes of each kind some requests need."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.performance import Constants
from engines.sim.timing import Speeds
from launcher.errors import ConfigError
from launcher.events.events import Events
from launcher.hosts.local.host import LocalHost
from launcher.measure import compare, size, sized_pair, traces
from launcher.measure.arms import Arm
from launcher.measure.calibrate import Measured
from launcher.measure.compare import Comparison, Job
from launcher.measure.fit import errors, fit
from launcher.measure.report import Report
from launcher.measure.slo import Slo
from launcher.plan.config import LaunchConfig
from tests.processes import free_port, free_range

pytestmark = pytest.mark.timeout(600)
CONSTANTS: dict[str, Any] = {
    "prefill": [0.02, 1e-4, 0.0], "decode": [0.01, 5e-4, 0.0], "hand_off": [0.01, 0.0], "kv_tokens": 400_000,
}  # fmt: skip
SLO = Slo(ttft=1.0, tpot=0.03)
positive = st.floats(1e-6, 10)


@given(positive, positive, positive)
def test_constants_that_were_measured_exactly_are_found(a: float, b: float, c: float) -> None:
    points = [((1.0, x, x * x), a + b * x + c * x * x) for x in (1.0, 2.0, 4.0, 8.0, 16.0)]
    assert max(map(abs, errors(points, fit(points)))) < 1e-3


def test_no_constant_is_below_zero() -> None:
    points = [((1.0, x, x * x), 1 + 0.1 * x - 0.001 * x * x) for x in (1.0, 2.0, 4.0, 8.0)]
    assert min(fit(points)) >= 0
    with pytest.raises(ValueError, match="nothing was measured"):
        fit([])


def sized(workload: str, nodes: int, **other: Any) -> size.Sized:
    made = traces.made(workload, 400, seed=1)
    return asyncio.run(size.size(Constants.model_validate(CONSTANTS | other), made, SLO, nodes))


def test_more_prompts_want_more_prefill_nodes() -> None:
    prompts = sized("input=6000,output=20,rate=3", 4)
    answers = sized("input=200,output=400,rate=12", 4, decode=[0.01, 8e-4, 0.0])
    assert prompts.outcomes[0].arm.prefill > 1
    assert answers.outcomes[0].arm.prefill <= 1
    assert len(prompts.outcomes) == 4


def test_it_says_what_breaks_first_with_more_traffic_and_what_helps() -> None:
    found = sized("input=6000,output=20,rate=2.6", 3)
    assert found.outcomes[0].arm == Arm(prefill=2, decode=1)
    assert found.stressed is not None
    assert found.stressed.binding(SLO) == "prefill"
    assert found.next_node == "a prefill node"


def test_with_time_enough_nothing_breaks() -> None:
    found = sized("input=100,output=5,rate=1", 2)
    assert found.stressed is None
    assert found.outcomes[0].share == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Invalid JSON"),
        ("{}", "constants: Field required"),
        ('{"constants": {}}', "constants.prefill: Field required"),
        ('{"constants": {"prefill": [1, 2]}}', "constants.prefill"),
    ],
)
def test_a_file_that_holds_no_constants_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "constants.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        size.read(file)
    with pytest.raises(ConfigError, match="cannot read"):
        size.read(tmp_path / "none")


def test_constants_of_a_cluster_one_has_not_bought_suffice(tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"constants": CONSTANTS}))
    assert size.read(file) == Measured(Constants.model_validate(CONSTANTS), [], [], [])
    assert size.read(file).errors() == {"prefill": 0.0, "decode": 0.0, "hand_off": 0.0}


def test_a_measured_pair_predicts_what_comparisons_of_its_nodes_find(tmp_path: Path) -> None:
    """Simulated nodes with room for few sequences, which are soon measured; limits that a busy machine keeps."""
    speeds = Speeds(
        prefill_s=0.02, prefill_token_s=0.0004, decode_s=0.02, decode_sequence_s=0.002, hand_off_s=0.03,
        step_tokens=2048,
    )  # fmt: skip
    base = LaunchConfig.model_validate(
        {
            "engine": "sim", "model": "tiny", "max_model_len": 100_000, "proxy_port": free_port(),
            "http_ports": free_range(4), "bootstrap_ports": free_range(4),
            "args": ["--speeds", speeds.model_dump_json(), "--num-gpu-blocks-override", "300"],
        }
    )  # fmt: skip
    workload, slo = traces.made("input=300,output=8,rate=4", 40, seed=2), Slo(ttft=10, tpot=1)
    measured = asyncio.run(sized_pair.measure(base, workload, tmp_path / "sized", LocalHost(), Events()))
    a, b, _ = measured.constants.prefill
    c, d, _ = measured.constants.decode
    assert a + 300 * b == pytest.approx(0.02 + 300 * 0.0004, rel=0.25)
    assert c + 4 * d == pytest.approx(0.02 + 4 * 0.002, rel=0.25)
    assert measured.constants.kv_tokens == 300 * 16
    job = Job(base, (Arm(prefill=1, decode=1), Arm(ordinary=2)), workload, slo, 1, tmp_path / "compared")
    compare.begin(job, resume=False)
    Report(job, asyncio.run(Comparison(job, LocalHost(), Events()).run())).write()
    folders = [tmp_path / "compared", tmp_path / "none"]
    checked = asyncio.run(size.checked_against(folders, measured.constants, "tiny", traces.from_file))
    assert {one.arm for one in checked} == {"1P1D", "2 ordinary"}
    for one in checked:
        assert one.predicted == pytest.approx(one.measured, rel=0.2)
    assert asyncio.run(size.checked_against(folders, measured.constants, "another", traces.from_file)) == []
