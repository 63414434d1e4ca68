"""lock.json: a run can be repeated by it, and it can be passed on."""

from pathlib import Path

import pytest

from engines.base import NodeRole
from launcher.errors import ConfigError
from launcher.plan.config import load
from launcher.plan.lockfile import LockFile
from launcher.plan.planner import another_node, make_plan
from tests.machines import machine

SHELL = {"PATH": "/usr/bin", "NCCL_DEBUG": "INFO", "HF_TOKEN": "canary-of-the-shell"}


def test_it_holds_what_the_run_is_now_and_not_what_it_was_at_its_start() -> None:
    config, facts = load({"model": "m"}), machine(environment=SHELL)
    made = make_plan(config, facts)
    taken = {port: "us" for node in made.nodes for port in (node.seat.http_port, *range(*node.seat.transfer_ports))}
    more = made.with_node(another_node(made, config, machine(taken=taken, environment=SHELL), NodeRole.DECODE))
    lock = LockFile.of(config, more, {"vllm": "0.32.0"})
    assert (lock.config.prefill, lock.config.decode, len(lock.seats)) == (1, 2, 3)
    assert lock.inherited["NCCL_DEBUG"] == "INFO"
    assert make_plan(lock.repeated({}, None), facts, lock.seats).nodes == more.nodes


def test_no_secret_is_in_it_and_a_repeated_run_takes_them_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(
        {
            "model": "m",
            "env": ["HF_TOKEN=canary-1", "A=shown"],
            "args": ["--api-key", "canary-2", "--seed=1"],
            "decode_args": ["--api-key=canary-3"],
            "node_args": ["decode-0=--api-key", "decode-0=canary-2", "decode-0=--seed=2"],
            "node_env": ["decode-0=AWS_SECRET_ACCESS_KEY=canary-4"],
        }
    )
    LockFile.of(config, make_plan(config, machine(environment=SHELL)), {}).write(tmp_path)
    text = (tmp_path / "lock.json").read_text()
    assert "canary" not in text
    assert "shown" in text
    lock = LockFile.read(tmp_path / "lock.json")
    with pytest.raises(ConfigError, match="HF_TOKEN was given to the run that is repeated"):
        lock.repeated({}, None)
    for name, value in (("HF_TOKEN", "1"), ("API_KEY", "2"), ("AWS_SECRET_ACCESS_KEY", "4")):
        monkeypatch.setenv(name, f"canary-{value}")
    again = lock.repeated({}, None)
    assert again.env == config.env
    assert again.args == config.args
    assert again.decode_args == ("--api-key=canary-2",)
    assert again.node_env == config.node_env
    assert again.node_args == config.node_args


def test_kv_moves_as_it_did_also_where_an_adapter_has_come_or_gone() -> None:
    config, facts = load({"model": "m", "device": "cuda"}), machine("8xh100-8hca")
    lock = LockFile.of(config, make_plan(config, facts), {})
    assert lock.config.transfer_protocol == "rdma"
    assert make_plan(lock.repeated({}, None), machine("hca-down"), lock.seats).protocol == "rdma"


def test_it_goes_with_no_other_flag_and_is_nothing_else() -> None:
    config = load({"model": "m"})
    lock = LockFile.of(config, make_plan(config, machine()), {})
    assert lock.repeated({"run_dir": "/x"}, None).run_dir == Path("/x")
    with pytest.raises(ConfigError, match="does not go with --decode, --config"):
        lock.repeated({"decode": "2"}, Path("f"))
    with pytest.raises(ConfigError, match="cannot read"):
        LockFile.read(Path("/no/such/lock.json"))
