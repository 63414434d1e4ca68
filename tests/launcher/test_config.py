"""Flags and files become one configuration, or one line that says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import LaunchConfig, PortRange, load
from launcher.errors import ConfigError


def config(**flags: Any) -> LaunchConfig:
    return load({"model": "tiny", **flags}, None)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text("model: a\nprefill: 3\nhttp-ports: 9000-9010\n")
    loaded = load({"model": "b"}, file)
    assert (loaded.model, loaded.prefill, str(loaded.http_ports)) == ("b", 3, "9000-9010")


def test_a_flags_text_means_what_the_files_value_means(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text(
        "model: m\ndevice: cuda\ndevices: [0, 1]\nprefill: 1\nargs: [--max-num-seqs, '4']\nenv: {A: b}\n"
        "http_ports: 9000-9001\n"
    )
    flags = {"model": "m", "device": "cuda", "devices": "0,1", "prefill": "1", "args": ["--max-num-seqs", "4"],
             "env": ["A=b"], "http_ports": "9000-9001"}  # fmt: skip
    with pytest.raises(ConfigError, match="devices"):
        load({}, file)  # numbers, where device names are texts: said, not guessed
    file.write_text(file.read_text().replace("[0, 1]", "0,1"))
    assert load({}, file) == load(flags, None)


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
        ({"prefill": "0"}, "--prefill: .*greater than or equal to 1"),
        ({"decode": "-1"}, "--decode: "),
        ({"decode": "two"}, "--decode: .*integer"),
        ({"http_ports": "8199-8100"}, "--http-ports: 8199-8100 is reversed, write 8100-8199"),
        ({"http_ports": "many"}, "--http-ports: 'many' is not of the form FIRST-LAST"),
        ({"http_ports": "0-10"}, "--http-ports: "),
        ({"transfer_ports": "20000-99999"}, "--transfer-ports: "),
        ({"device": "tpu"}, "--device: .*'cpu' or 'cuda'"),
        ({"engine": "tgi"}, "--engine: .*'vllm' or 'sim'"),
        ({"env": ["NOVALUE"]}, "--env: write NAME=VALUE"),
        ({"args": ["--port=1"]}, "args: --port is set by pd-launch itself"),
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
