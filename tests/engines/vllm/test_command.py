"""vLLM's command line, environment and counters."""

import json
from typing import Any

import pytest

from engines.base import Role
from engines.vllm import command, metrics


def launch(**changes: Any) -> command.Launch:
    settings: dict[str, Any] = {
        "role": Role.PREFILL,
        "model": "/models/m",
        "served_model_name": "m",
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


def test_several_devices_are_tensor_parallelism() -> None:
    args = command.arguments(launch(devices=("0", "1")))
    assert args[args.index("--tensor-parallel-size") + 1] == "2"


def test_the_users_own_flags_come_last_and_so_win() -> None:
    args = command.arguments(launch(max_model_len=100, extra_args=("--max-model-len", "200")))
    assert args[-2:] == ["--max-model-len", "200"]


def test_the_kv_configuration_is_one_argument_of_valid_json() -> None:
    args = command.arguments(launch(role=Role.DECODE))
    config = json.loads(args[args.index("--kv-transfer-config") + 1])
    assert config["kv_role"] == "kv_consumer"
    assert config["kv_load_failure_policy"] == "recompute"


@pytest.mark.parametrize("connector", ["MooncakeConnector", "MultiConnector"])
def test_a_decode_node_that_pulls_over_tcp_keeps_no_prefix_cache(connector: Any) -> None:
    """KV that comes in late would stay in it; RDMA's writes end with their queue pair."""
    alone = "--no-enable-prefix-caching"
    assert alone in command.arguments(launch(role=Role.DECODE, connector=connector))
    assert alone not in command.arguments(launch(role=Role.DECODE, connector=connector, protocol="rdma"))
    assert alone not in command.arguments(launch(role=Role.PREFILL, connector=connector))
    assert alone not in command.arguments(launch(role=Role.DECODE, connector="MooncakeStoreConnector"))


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
