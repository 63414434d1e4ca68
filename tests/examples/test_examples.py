"""The examples run as they stand; what needs a GPU is planned, and what needs engines runs in `tests/e2e`."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.plan.plan import Plan
from launcher.setup.environments import libraries_of
from launcher.setup.install import EngineEnvironment
from tests.launched import at_once, up
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
    result = at_once("plan", "--config", str(EXAMPLES / f"{name}.yaml"), "--json")
    assert [node["devices"] for node in json.loads(result.stdout)["nodes"]] == devices


def planned(*words: str) -> Plan:
    """What `up` with these words would start."""
    assert words[0] == "up"
    result = at_once("plan", *(word for word in words[1:] if word != "--logs"), "--json")
    assert result.returncode == 0, result.stderr
    return Plan.model_validate_json(result.stdout)


def test_the_image_has_what_the_set_up_installs_and_starts_what_can_be_planned() -> None:
    """No Docker daemon is here: the image was not built."""
    text = (EXAMPLES / "Dockerfile").read_text()
    assert set(libraries_of("cuda").values()) <= set(text.split())
    (_, pip) = EngineEnvironment.of("cuda").commands()[-1]
    assert [word for word in pip if "==" in word] == re.findall(r"[\w-]+==[\w.]+", text)
    (command,) = re.findall(r"(?m)^CMD (.*)$", text)
    assert planned(*json.loads(command)).proxy.ports[0].bind == "0.0.0.0"


def test_the_compose_file_starts_what_can_be_planned() -> None:
    service = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]["pd-launch"]
    plan = planned(*service["command"])
    assert (plan.device, plan.run_dir) == ("cuda", Path("/state/run"))
    assert service["init"] is True
    assert service["healthcheck"]["test"][1:3] == ["pd-launch", "status"]


def test_the_unit_starts_what_can_be_planned_and_is_told_when_it_is_ready(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say of it."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((EXAMPLES / "pd-launch.service").read_text())
    service = unit["Service"]
    assert (service["Type"], service["KillMode"]) == ("notify", "mixed")
    words = service["ExecStart"].replace("%S", str(tmp_path)).split()[1:]
    words[words.index("--config") + 1] = str(EXAMPLES / "cpu-1p1d.yaml")
    assert planned(*words).run_dir == tmp_path / "pd-launch" / "run"


def test_no_example_is_forgotten_here() -> None:
    tested = {"openai_client.py", "curl.sh", "sim-2p1d.yaml", "gpu-1p1d.yaml", "cpu-1p1d.yaml", "Dockerfile",
              "Dockerfile.dockerignore", "compose.yaml", "pd-launch.service", "demo.svg", "page.png"}  # fmt: skip
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested
