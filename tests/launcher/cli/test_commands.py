"""Commands that start nothing: help, flags that are refused, plans, facts, checks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.app import COMMANDS, command_named
from launcher.cli.flags import GROUPS
from launcher.plan.config import LaunchConfig
from tests.launched import PD_LAUNCH, at_once, own_ports
from tests.machines import FOLDER, NAMES, machine
from tests.processes import ROOT, free_port, free_range

SIM = ("--engine", "sim", "--model", "tiny")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_says_what_the_table_says(command: str) -> None:
    result = at_once(command, "--help")
    assert result.returncode == 0
    assert "Usage: " in result.stdout
    listed, told = (re.findall(r"\w+", text)[:2] for text in (COMMANDS[command][1], command_named(command).help))
    assert listed == told


def test_alone_it_lists_its_commands() -> None:
    result = at_once()
    assert all(f"  {command} " in result.stdout + result.stderr for command in COMMANDS)
    assert at_once("--version").stdout.startswith("pd-launch ")


def test_every_setting_has_a_flag_in_one_group() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(LaunchConfig.model_fields)
    shown = at_once("up", "--help").stdout
    assert all(f"\n{group}:\n" in shown for group in GROUPS)
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--model", "tiny", "--prefill", "0"], 2, "--prefill"),
        (["--model", "tiny", "--http-ports", "8199-8100"], 2, "reversed"),
        (["--model", "tiny", "--http-ports", "8100-8110", "--bootstrap-ports", "8100-8110"], 2, "overlap"),
        (["--model", "tiny", "--http-ports", "8100-8100"], 2, "need 2"),
        (["--model", "/no/such/model", "--engine-python", sys.executable], 4, "no such folder"),
        (["--model", "tiny", "--engine-python", "/no/such/python"], 4, "cannot run /no/such/python"),
        (["--model", "tiny", "--engine-python", sys.executable], 4, "No module named vllm"),
        (["--config", "/no/such/file.yaml"], 2, "cannot read /no/such/file.yaml"),
        ([], 2, "--model is missing"),
        ([*SIM, "--proxy-host", "192.0.2.1"], 4, "cannot use address 192.0.2.1"),
        ([*SIM, "--run-dir", "/proc/nowhere"], 4, "cannot make /proc/nowhere"),
        ([*SIM, "--args=--port=1"], 2, "use --http-ports"),
        ([*SIM, "--detach", "--json"], 2, "--detach goes with neither"),
        ([*SIM, "--locked", "/no/such/lock.json"], 2, "cannot read /no/such/lock.json"),
    ],
)
def test_what_cannot_work_is_one_line_and_an_exit_code_and_starts_nothing(
    flags: list[str], code: int, says: str
) -> None:
    result = at_once("up", *own_ports(2), *flags)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == "", "nothing was started"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    result = at_once("up", "--model", str(tmp_path), *own_ports(2))
    assert result.returncode == 4
    assert "has no config.json" in result.stderr


def test_a_busy_port_is_named_with_its_holder_and_nothing_is_started(tmp_path: Path) -> None:
    first, last = free_range(2).split("-")
    with socket.create_server(("127.0.0.1", int(last))):
        flags = [*own_ports(2), "--http-ports", f"{first}-{last}"]
        result = at_once("up", *SIM, "--run-dir", str(tmp_path / "run"), *flags)
    assert result.returncode == 3
    assert f"{last} is taken by pid {os.getpid()}" in result.stderr
    assert f"no free port is left in --http-ports {first}-{last}" in result.stderr
    assert not (tmp_path / "run").exists()


# -- plan


def test_a_plan_fits_a_narrow_screen_and_tells_all_of_it_if_asked() -> None:
    facts = ("--facts", str(FOLDER / "laptop.json"))
    short = at_once("plan", "--model", "tiny", "--prefill", "2", *facts).stdout
    assert all(len(line.rstrip()) <= 80 for line in short.splitlines())
    assert len(short.splitlines()) <= 14
    for shown in ("MooncakeConnector over tcp: engines on a CPU", "prefill-1  8101  8901       20016-20031", "proxy"):
        assert shown in short
    long = at_once("plan", "--model", "tiny", "--prefill", "2", "-v", *facts).stdout
    for shown in ("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT=60", '"kv_load_failure_policy":"recompute"',
                  "inherits PATH HOME", "ports that cannot be chosen"):  # fmt: skip
        assert shown in long


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_for_a_host_that_is_not_here_is_made_from_its_facts(name: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(machine(name).model_dump_json())
    flags = [
        "--model",
        "Qwen/Qwen3-8B",
        "--device",
        "cuda",
        "--devices",
        "0,0",
        "--facts",
        str(tmp_path / "facts.json"),
    ]
    plan = json.loads(at_once("plan", *flags, "--json").stdout)
    assert [node["name"] for node in plan["nodes"]] == ["prefill-0", "decode-0"]
    assert plan["protocol_why"]
    assert plan["download"] == {"model": "Qwen/Qwen3-8B", "revision": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [("no json", "Invalid JSON"), ("{}", "our_python: Field required"), ('{"gpus": [{"id": 0}]}', "gpus.0.id"),
     ('{"lots": 1}', "Field required|Extra inputs")],
)  # fmt: skip
def test_a_file_without_facts_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "facts.json").write_text(text)
    result = at_once("plan", *SIM, "--facts", str(tmp_path / "facts.json"))
    assert result.returncode == 2
    assert any(part in result.stderr for part in says.split("|"))
    assert at_once("check", *SIM, "--facts", "/no/such").returncode == 2


def test_the_plan_as_json_is_what_up_would_start() -> None:
    plan = json.loads(at_once("plan", *SIM, "--json").stdout)
    assert [node["name"] for node in plan["nodes"]] == ["prefill-0", "decode-0"]
    assert "8000" in plan["proxy"]["command"]


def test_plan_needs_no_free_port() -> None:
    with socket.create_server(("127.0.0.1", port := free_port())):
        assert at_once("plan", *SIM, "--proxy-port", str(port)).returncode == 0


# -- facts and check


def test_the_facts_of_this_host_are_shown_and_go_back_into_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    text = at_once("facts", *SIM, "--json").stdout
    assert "canary" not in text
    (tmp_path / "facts.json").write_text(text)
    assert at_once("plan", *SIM, "--facts", str(tmp_path / "facts.json")).returncode == 0
    shown = at_once("facts", *SIM).stdout
    for word in ("host ", "memory ", "GPUs ", "RDMA ", "engine "):
        assert f"\n{word}" in f"\n{shown}"


def test_gpus_and_adapters_are_shown(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(machine("8xh100-8hca").model_dump_json())
    flags = ["--model", "m", "--device", "cuda", "--facts", str(tmp_path / "facts.json")]
    shown = at_once("check", *flags).stdout
    assert "GPUs         8 x NVIDIA H100 80GB HBM3, driver 580.95.05" in shown
    assert "KV transfer  MooncakeConnector over rdma (mlx5_0" in shown
    assert shown.endswith("0 errors, 0 warnings\n")


def findings(*flags: str, code: int) -> dict[str, str]:
    """What `check --json` finds: what is wrong -> how to fix it."""
    result = at_once("check", "--json", *own_ports(2), *flags)
    assert result.returncode == code, result.stdout + result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return {finding["what"]: finding["fix"] for one in found for finding in one["findings"]}


def test_a_host_with_nothing_wrong_says_what_was_looked_at(tmp_path: Path) -> None:
    result = at_once("check", *SIM, "--run-dir", str(tmp_path / "run"), *own_ports(2))
    assert result.returncode == 0
    assert "✓ machine " in result.stdout
    assert "0 errors, " in result.stdout
    assert not (tmp_path / "run").exists(), "it starts nothing, and makes nothing"


def test_a_taken_port_is_found_with_its_holder(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        found = findings(*SIM, "--run-dir", str(tmp_path), "--proxy-port", str(port), code=3)
    (fix,) = (
        fix for what, fix in found.items() if f"proxy port {port} on 127.0.0.1 is taken by pid {os.getpid()}" in what
    )
    assert fix == "End what holds it, or choose with --proxy-port"


def test_a_host_name_that_resolves_to_loopback_is_found(tmp_path: Path) -> None:
    """Debian's 127.0.1.1, in an /etc/hosts of its own."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
    command = ["unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh", *PD_LAUNCH]
    command += ["check", *SIM, "--run-dir", str(tmp_path / "run"), "--host", "192.0.2.7", *own_ports(2)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 4
    assert "resolves to 127.0.1.1" in result.stdout
    assert "prefill-0: cannot use address 192.0.2.7" in result.stdout


def test_a_full_disk_is_found_before_there_is_something_to_log() -> None:
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=64k none "$0" && (yes > "$0/full" || true) 2>/dev/null; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "/mnt", *PD_LAUNCH, "check", *SIM, "--run-dir", "/mnt/run"]
    result = subprocess.run(
        [*command, *own_ports(2)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 4
    assert "no room for logs in /mnt/run" in result.stdout


def test_too_few_open_files_are_found(tmp_path: Path) -> None:
    command = ["prlimit", "--nofile=512:512", *PD_LAUNCH, "check", "--model", "some/model", "--run-dir", str(tmp_path)]
    result = subprocess.run(
        [*command, *own_ports(2)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 4
    assert "at most 512 files may be open" in result.stdout


# -- setup


def test_setup_names_the_interpreter_it_would_make() -> None:
    result = at_once("setup", "--print-python")
    assert result.returncode == 0
    assert result.stdout.strip().endswith("/bin/python")


def test_setup_for_gpus_shows_what_it_would_run() -> None:
    result = at_once("setup", "--device", "cuda")
    assert result.returncode == 0
    assert "mooncake-transfer-engine-cuda13==" in result.stdout


def test_setup_refuses_an_environment_without_an_engine_and_a_device_that_there_is_not() -> None:
    result = at_once("setup", "--engine-python", sys.executable)
    assert result.returncode == 4
    assert "No module named" in result.stderr
    assert at_once("setup", "--device", "tpu").returncode == 2


# -- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_that_is_asked_for_before_anything_was_started_has_its_exit_code_and_no_traceback(number: int) -> None:
    program = (
        "import os, signal, sys, launcher.cli\n"
        f"sys.meta_path.insert(0, type('F', (), dict(find_spec=staticmethod(lambda name, *_: "
        f"os.kill(os.getpid(), {number}) if name.startswith('launcher.hosts') else None))))\n"
        "sys.argv = ['pd-launch', 'plan', '--model', 'tiny', '--engine', 'sim']\n"
        "launcher.cli.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
