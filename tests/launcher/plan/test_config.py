"""Flags and files become one configuration, or one line that says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import NodeRole
from launcher.errors import ConfigError
from launcher.plan.config import LaunchConfig, PortRange, load


def config(**flags: Any) -> LaunchConfig:
    return load({"model": "tiny", **flags}, None)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text("model: a\nprefill: 3\nhttp-ports: 9000-9010\n")
    loaded = load({"model": "b"}, file)
    assert (loaded.model, loaded.prefill, str(loaded.http_ports)) == ("b", 3, "9000-9010")


@pytest.mark.parametrize("devices", ["[0, 1]", "0,1", '["0", "1"]'])
@pytest.mark.parametrize("args", ["[--max-num-seqs, 4]", "--max-num-seqs 4", '["--max-num-seqs", "4"]'])
def test_a_flags_text_means_what_the_files_value_means(tmp_path: Path, devices: str, args: str) -> None:
    """YAML makes numbers and truth values of what people write."""
    file = tmp_path / "pd.yaml"
    file.write_text(
        f"model: m\ndevice: cuda\ndevices: {devices}\nprefill: 1\nargs: {args}\nenv: {{A: 4, B: true, C: x}}\n"
        "http_ports: 9000-9001\ntensor_parallel: {prefill: 2, decode: 4}\n"
    )
    flags = {"model": "m", "device": "cuda", "devices": "0,1", "prefill": "1", "args": ["--max-num-seqs", "4"],
             "env": ["A=4", "B=true", "C=x"], "http_ports": "9000-9001",
             "tensor_parallel": "prefill=2,decode=4"}  # fmt: skip
    assert load({}, file) == load(flags)


def test_a_flag_goes_before_a_variable_and_a_variable_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text("model: of-the-file\nprefill: 3\ndecode: 4\n")
    variables = {"PD_LAUNCH_MODEL": "of-the-shell", "PD_LAUNCH_DECODE": "5", "PD_LAUNCH_ARGS": "--a '--b c'"}
    loaded = load({"decode": "6"}, file, variables | {"PD_LAUNCH_ID": "a run", "PATH": "/usr/bin"})
    assert (loaded.model, loaded.prefill, loaded.decode, loaded.args) == ("of-the-shell", 3, 6, ("--a", "--b c"))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PD_LAUNCH_MODLE": "m"}, "PD_LAUNCH_MODLE is set, and no flag is called like it"),
        ({"PD_LAUNCH_PREFILL": "many"}, "PD_LAUNCH_PREFILL: .*integer"),
    ],
)
def test_a_wrong_variable_is_named(variables: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load({"model": "m"}, None, variables)


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_a_range_reads_as_it_is_written(one: int, other: int) -> None:
    first, last = sorted((one, other))
    ports = config(http_ports=f"{first}-{last}").http_ports
    assert (ports.first, ports.last, len(ports), str(ports)) == (first, last, last - first + 1, f"{first}-{last}")


@given(*[st.integers(1, 100)] * 4)
def test_ranges_overlap_when_they_share_a_port(a: int, b: int, c: int, d: int) -> None:
    one, other = PortRange(first=min(a, b), last=max(a, b)), PortRange(first=min(c, d), last=max(c, d))
    shared = set(range(one.first, one.last + 1)) & set(range(other.first, other.last + 1))
    assert one.overlaps(other) == other.overlaps(one) == bool(shared)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"prefill": "-1"}, "--prefill: .*greater than or equal to 0"),
        ({"prefill": "0"}, "--prefill 0, --decode 1 and --both 0 cannot hand over"),
        ({"both": "1"}, "--prefill 0, --decode 0 and --both 1 cannot hand over"),
        ({"connector": "none", "prefill": "1"}, "connector none: .*give only --decode"),
        ({"connector": "none", "decode": "0"}, "connector none: .*give only --decode"),
        ({"connector": "none", "both": "2"}, "connector none: .*give only --decode"),
        ({"both": "2", "connector": "MooncakeStoreConnector"}, "both: .*not the MooncakeStoreConnector"),
        ({"both": "2", "tensor_parallel": "prefill=1,decode=2"}, "both: .*give tensor_parallel one number"),
        ({"both": "2", "device": "cuda", "prefill_devices": "0", "decode_devices": "1"}, "both: does not go with"),
        ({"decode": "-1"}, "--decode: "),
        ({"decode": "two"}, "--decode: .*integer"),
        ({"http_ports": "8199-8100"}, "--http-ports: 8199-8100 is reversed, write 8100-8199"),
        ({"http_ports": "many"}, "--http-ports: 'many' is not of the form FIRST-LAST"),
        ({"http_ports": "0-10"}, "--http-ports: "),
        ({"transfer_ports": "20000-99999"}, "--transfer-ports: "),
        ({"device": "tpu"}, "--device: .*'cpu' or 'cuda'"),
        ({"engine": "tgi"}, "--engine: .*'vllm' or 'sim'"),
        ({"env": ["NO_SUCH_VARIABLE"]}, "--env: write NAME=VALUE, or the name of a variable that is set here"),
        ({"env": ["=x"]}, "--env: write NAME=VALUE"),
        ({"args": ["--port=1"]}, "args: --port is set by pd-launch itself: use --http-ports"),
        ({"args": ["--served_model_name", "x"]}, "args: --served_model_name is set by pd-launch itself"),
        ({"args": ["--kv-transfer-config.kv_role=kv_both"]}, "--kv-transfer-config.kv_role is set by"),
        ({"args": ["--served-model", "x"]}, "--served-model is set by pd-launch itself"),
        ({"args": ["-tp", "2"]}, "args: -tp is set by pd-launch itself: use --tensor-parallel"),
        ({"prefill_args": ["--data-parallel-size=2"]}, "use --data-parallel"),
        ({"args": ["--ssl-keyfile", "k"]}, "asks its nodes over HTTP"),
        ({"args": ["--config", "f"]}, "may hold what pd-launch decides"),
        ({"args": ["--disable-log-stats"]}, "nobody can tell whether KV moves"),
        ({"args": ["--nnodes", "2"]}, "lies on one host"),
        ({"env": ["CUDA_VISIBLE_DEVICES=0"]}, "env: CUDA_VISIBLE_DEVICES is decided by the plan: use --devices"),
        ({"env": ["MC_MIN_RPC_PORT=1"]}, "use --transfer-ports"),
        ({"node_env": ["prefill-0=TMPDIR=/x"]}, "node_env: TMPDIR is decided by the plan"),
        ({"node_env": ["TMPDIR=/x"]}, "node_env: write NODE="),
        ({"tensor_parallel": "two"}, "--tensor-parallel: 'two' is no number"),
        ({"tensor_parallel": "prefill=2,both=4"}, "--tensor-parallel: "),
        ({"tensor_parallel": "0"}, "--tensor-parallel: .*greater than or equal to 1"),
        (
            {"device": "cuda", "devices": "0", "prefill_devices": "1", "decode_devices": "2"},
            "name each GPU in one of them",
        ),
        ({"device": "cuda", "prefill_devices": "1"}, "goes with decode_devices"),
        ({"devices": "0"}, "--device is cpu; add --device cuda"),
        ({"hung_after_s": "0"}, "--hung-after-s: "),
        ({"decode_args": ["--kv-transfer-config", "{}"]}, "decode_args: --kv-transfer-config"),
        ({"model": ""}, "--model: "),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_wrong(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**flags)


def test_a_missing_model_is_named_as_flag_and_as_key() -> None:
    with pytest.raises(ConfigError, match=r"--model is missing \(or 'model:' in a --config file\)"):
        load({}, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modell: x", "unknown key 'modell'; known are model, "),
        ("- a list", "must hold settings"),
        ("a: [", "is not YAML"),
        ("model: m\nprefill: many", "prefill: .*integer"),
        ("1: 2", "must hold settings"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        load({}, file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        load({}, tmp_path / "none.yaml")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text("# nothing yet\n")
    assert load({"model": "tiny"}, file) == config()


@pytest.mark.parametrize("args", [["--port", "9"], ["--tls-key=x"], ["--topology", "f"], ["--config=f"], ["--host=::"]])
def test_flags_of_the_proxy_that_would_contradict_the_plan_are_refused_at_once(args: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{args[0].split('=')[0]} (is set|does not go|may hold)"):
        load({"model": "m", "proxy_args": args}, None)
    assert load({"model": "m", "proxy_args": ["--resume", "--queue-timeout-s=3"]}, None).proxy_args


def test_flags_that_only_begin_like_the_plans_are_left_alone() -> None:
    words = ["--max-num-seqs", "8", "--model-impl=vllm", "--data-parallel-backend", "mp", "--port-of-something-else=1"]
    assert config(args=words).args == tuple(words)


@pytest.mark.parametrize(
    ("text", "prefill", "decode"), [("4", 4, 4), ("prefill=2,decode=4", 2, 4), ("decode=8", None, 8)]
)
def test_a_size_is_for_both_roles_or_for_each(text: str, prefill: int | None, decode: int | None) -> None:
    sizes = config(tensor_parallel=text).tensor_parallel
    assert (sizes.of(NodeRole.PREFILL), sizes.of(NodeRole.DECODE)) == (prefill, decode)
    assert str(sizes) == text
