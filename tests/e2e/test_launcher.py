"""The launcher and real engines: their own parser takes every plan, the doctor names what really failed."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.hosts.local.facts import gather
from launcher.plan.config import load
from launcher.plan.facts import EngineFacts
from launcher.plan.planner import make_plan
from launcher.setup.install import EngineEnvironment
from tests.launched import own_ports, run_to_end, up
from tests.machines import machine
from tests.processes import ROOT

pytestmark = pytest.mark.timeout(1200)

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
for arguments in json.load(sys.stdin):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    config = parsed.kv_transfer_config
    print("PARSED", json.dumps([config.kv_connector, config.kv_role, parsed.tensor_parallel_size, parsed.port]))
"""


def test_every_command_line_a_plan_has_is_accepted_by_the_engines_own_parser() -> None:
    connectors = ("MooncakeConnector", "MooncakeStoreConnector", "MultiConnector")
    wanted: list[dict[str, Any]] = [
        {"model": "tiny", "max_model_len": 512, "args": ["--max-num-seqs", "8"], "served_model_name": "a,b"},
        {"model": "Qwen/Qwen3-8B", "device": "cuda", "devices": "0,1", "transfer_protocol": "rdma"},
        {"model": "Qwen/Qwen3-8B", "device": "cuda", "devices": "0,1,2,3", "decode_args": ["--max-num-seqs", "256"]},
        {"model": "Qwen/Qwen3-8B", "device": "cuda", "tensor_parallel": "2", "data_parallel": "2",
         "pipeline_parallel": "2", "rdma_devices": ["mlx5_0,mlx5_1"], "prefill_args": ["--numa-bind"]},
    ]  # fmt: skip
    machines = {"cpu": gather(load({"model": "tiny"})), "cuda": machine("8xh100-8hca", gpus=(), engine=EngineFacts(
        python=str(EngineEnvironment.of("cpu").python)))}  # fmt: skip
    plans = [
        make_plan(load(flags | {"connector": connector}), machines[flags.get("device", "cpu")])
        for connector in connectors
        for flags in wanted
    ]
    commands = [node.command[node.command.index("--model") :] for plan in plans for node in plan.nodes]
    result = subprocess.run(
        [str(EngineEnvironment.of("cpu").python), "-c", PARSE],
        input=json.dumps(commands), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    parsed = [json.loads(line.removeprefix("PARSED ")) for line in result.stdout.splitlines() if "PARSED" in line]
    assert [role for _, role, _, _ in parsed] == ["kv_producer", "kv_consumer"] * len(plans)
    assert [workers for _, _, workers, _ in parsed] == [1, 1, 1, 1, 2, 2, 2, 2] * 3
    names = [
        name
        for connector in connectors
        for name in [connector if connector == "MultiConnector" else f"Cpu{connector}"] * 2 + [connector] * 6
    ]
    assert [name for name, _, _, _ in parsed] == names


def test_a_real_engine_that_does_not_start_is_explained_by_its_true_cause(tmp_path: Path) -> None:
    flags = ["--decode-args=--max-model-len", "--decode-args=999999"]
    with up(tmp_path, "--config", str(ROOT / "examples" / "cpu-1p1d.yaml"), *flags) as run:
        assert run.process.wait(900) == 6
    assert "cause  decode-0 said, line" in run.output
    assert "[max-model-len-too-big]" in run.output
    doctor = json.loads(run_to_end(["doctor", "--json", str(run.run_dir)]).stdout)
    assert doctor["causes"][0]["id"] == "max-model-len-too-big"


def test_the_staged_self_test_passes_on_two_real_prefill_nodes_and_a_decode_node(tmp_path: Path) -> None:
    flags = ["--config", str(ROOT / "examples" / "cpu-1p1d.yaml"), "--run-dir", str(tmp_path / "run"), *own_ports(3)]
    result = run_to_end(["test", "--prefill", "2", *flags], patience_s=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MB arrived as they were sent" in result.stdout
    assert "ports are the planned ones" in result.stdout
    assert "All stages passed." in result.stdout
