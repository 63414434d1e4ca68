"""vLLM's command line, environment and counters."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import NodeRole, Parallel
from engines.vllm import command, metrics


def launch(**changes: Any) -> command.Launch:
    settings: dict[str, Any] = {
        "role": NodeRole.PREFILL,
        "model": "/models/m",
        "served_names": ("m",),
        "host": "127.0.0.1",
        "port": 8100,
        "device": "cuda",
        "protocol": "tcp",
        "transfer_ports": (20000, 20015),
        "bootstrap_port": 8900,
        "transfer_timeout_s": 60,
    }
    return command.Launch(**(settings | changes))


def test_a_gpu_node_gets_its_device_and_no_cpu_settings() -> None:
    node = launch(devices=("3",))
    assert command.environment(node)["CUDA_VISIBLE_DEVICES"] == "3"
    assert not any(name.startswith("VLLM_CPU") for name in command.environment(node))
    assert "--tensor-parallel-size" not in command.arguments(node)
    assert "--enforce-eager" not in command.arguments(node)


def test_sizes_that_are_not_1_are_told() -> None:
    args = command.arguments(launch(parallel=Parallel(tensor=2, data=4)))
    assert args[args.index("--tensor-parallel-size") + 1] == "2"
    assert args[args.index("--data-parallel-size") + 1] == "4"
    assert "--pipeline-parallel-size" not in args


def test_gloo_talks_over_the_interface_of_the_nodes_address() -> None:
    assert command.environment(launch(interface="eth1"))["GLOO_SOCKET_IFNAME"] == "eth1"
    assert "GLOO_SOCKET_IFNAME" not in command.environment(launch())


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--max-model-len=8", "--max-model-len"),
        ("--max_model_len", "--max-model-len"),
        ("--kv-transfer-config.kv_role=x", "--kv-transfer-config"),
        ("-tp", "--tensor-parallel-size"),
        ("8", ""),
        ("", ""),
    ],
)
def test_a_flag_is_read_as_vllms_parser_reads_it(word: str, name: str) -> None:
    assert command.flag_name(word) == name


def test_a_command_line_is_flags_with_their_values() -> None:
    words = ["--dtype", "half", "--enforce-eager", "--seed=1", "stray", "--dtype=float", "-sc", "{}"]
    assert command.given(words) == {
        "--dtype": "float", "--enforce-eager": "", "--seed": "1", "--speculative-config": "{}",
    }  # fmt: skip


@given(st.lists(st.text(max_size=12), max_size=8))
def test_no_words_are_too_odd_to_be_read(words: list[str]) -> None:
    assert set(command.owned(words).values()) <= set(command.OWNED_FLAGS.values())
    assert all(name.startswith("-") for name in command.given(words))


@given(st.sampled_from(sorted(command.OWNED_FLAGS)), st.sampled_from(["", "=x", ".x", ".x=y"]), st.booleans())
def test_a_flag_of_the_plan_is_found_however_it_is_spelt(flag: str, behind: str, underscored: bool) -> None:
    word = flag[:2] + flag[2:].replace("-", "_") if underscored else flag
    assert list(command.owned(["--seed", "1", word + behind])) == [(word + behind).partition("=")[0]]


def test_the_users_own_flags_come_last_and_so_win() -> None:
    args = command.arguments(launch(max_model_len=100, extra_args=("--max-model-len", "200")))
    assert args[-2:] == ["--max-model-len", "200"]


def test_the_kv_configuration_is_one_argument_of_valid_json() -> None:
    args = command.arguments(launch(role=NodeRole.DECODE))
    config = json.loads(args[args.index("--kv-transfer-config") + 1])
    assert config["kv_role"] == "kv_consumer"
    assert config["kv_load_failure_policy"] == "recompute"


@pytest.mark.parametrize("connector", ["MooncakeConnector", "MultiConnector"])
def test_a_decode_node_that_pulls_over_tcp_keeps_no_prefix_cache(connector: Any) -> None:
    """KV that comes in late would stay in it; RDMA's writes end with their queue pair."""
    alone = "--no-enable-prefix-caching"
    assert alone in command.arguments(launch(role=NodeRole.DECODE, connector=connector))
    assert alone in command.arguments(launch(role=NodeRole.BOTH, connector=connector))
    assert alone not in command.arguments(launch(role=NodeRole.DECODE, connector=connector, protocol="rdma"))
    assert alone not in command.arguments(launch(role=NodeRole.PREFILL, connector=connector))
    assert alone not in command.arguments(launch(role=NodeRole.DECODE, connector="MooncakeStoreConnector"))


def test_without_a_connector_it_is_an_ordinary_server() -> None:
    ordinary = launch(role=NodeRole.DECODE, connector="none", device="cpu", bootstrap_port=None)
    args = command.arguments(ordinary)
    assert not {"--kv-transfer-config", "--no-enable-prefix-caching"} & set(args)
    assert not [name for name in command.environment(ordinary) if name.startswith(("MC_", "VLLM_MOONCAKE"))]
    assert not command.needs_plugins(ordinary)


METRICS = """\
# TYPE vllm:prompt_tokens_by_source counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"} 28.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"} 18.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="tiny",source="external_kv_transfer"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
"""


def test_transferred_tokens_are_counted_over_all_engines_and_nothing_else() -> None:
    assert metrics.transferred_tokens(METRICS) == 20
    assert metrics.kv_cache_usage(METRICS) == 0.25


def test_a_node_that_has_not_counted_yet_has_transferred_nothing() -> None:
    assert metrics.transferred_tokens("") == 0


@pytest.mark.parametrize("answer", [None, [], {"data": None}, {"data": [1]}, {"data": [{"name": "m"}]}])
def test_what_is_no_list_of_models_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="models"):
        metrics.model_cards(answer)


def test_of_the_caches_configuration_only_what_must_be_equal_is_told() -> None:
    text = (
        "# TYPE vllm:cache_config_info gauge\n"
        'vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",kv_cache_layout="a \\"b\\"",'
        'num_gpu_blocks="2048"} 1.0\n'
    )
    config = metrics.cache_config(text)
    layout = {"block_size": "128", "cache_dtype": "auto", "kv_cache_layout": 'a \\"b\\"'}
    assert metrics.cache_layout(config) == layout
    assert metrics.cache_tokens(config) == 128 * 2048
    assert metrics.cache_config("") == {}
    assert metrics.cache_layout({}) == {}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, None),
        ({"num_gpu_blocks": "None", "block_size": "16"}, None),
        ({"num_gpu_blocks": "-5", "block_size": "16"}, None),
        ({"num_gpu_blocks": "5"}, None),
        ({"num_gpu_blocks": "5", "block_size": "16", "enable_prefix_caching": "True"}, 80),
        ({"num_gpu_blocks": "5", "block_size": "16", "enable_prefix_caching": "False"}, 0),
    ],
)
def test_the_room_of_a_prefix_cache_is_what_the_node_says(config: dict[str, str], tokens: int | None) -> None:
    assert metrics.cache_tokens(config) == tokens
