"""The examples run as they stand; what needs a GPU is planned, and what needs engines runs in `tests/e2e`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launched import run_to_end, up
from tests.processes import PATIENCE_S, ROOT, Proxy

EXAMPLES = ROOT / "examples"


def test_the_openai_client_example(proxy: Proxy) -> None:
    program = [sys.executable, str(EXAMPLES / "openai_client.py"), f"{proxy.url}/v1"]
    result = subprocess.run(program, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    assert "CompletionUsage" in result.stdout


def test_the_curl_example(proxy: Proxy) -> None:
    program = [str(EXAMPLES / "curl.sh"), proxy.url]
    result = subprocess.run(program, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    assert "data: [DONE]" in result.stdout
    assert "pd_hand_off_prompt_tokens_total" in result.stdout


def test_the_simulator_example(tmp_path: Path) -> None:
    with up(tmp_path, "--config", str(EXAMPLES / "sim-2p1d.yaml"), nodes=3) as run:
        run.until("Ready:", PATIENCE_S)
        assert run.end() == 0


@pytest.mark.parametrize(("name", "devices"), [("gpu-1p1d", [["0"], ["1"]]), ("cpu-1p1d", [[], []])])
def test_every_configuration_can_be_planned(name: str, devices: list[list[str]]) -> None:
    result = run_to_end(["plan", "--config", str(EXAMPLES / f"{name}.yaml"), "--json"])
    assert [node["devices"] for node in json.loads(result.stdout)["nodes"]] == devices


def test_no_example_is_forgotten_here() -> None:
    tested = {"openai_client.py", "curl.sh", "sim-2p1d.yaml", "gpu-1p1d.yaml", "cpu-1p1d.yaml"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested
