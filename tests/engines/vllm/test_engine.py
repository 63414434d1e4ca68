"""What the proxy asks of a node's software."""

import orjson
import pytest

from engines.known import ENGINES
from engines.vllm.engine import VLLM

CARDS = b'{"data": [{"id": "m", "max_model_len": 100}]}'


def test_a_probes_answers_become_facts() -> None:
    text = b'vllm:num_requests_running{model_name="m"} 3\nvllm:kv_cache_usage_perc{model_name="m"} 0.5\n'
    facts = VLLM().facts(CARDS, text, b'{"version": "0.32.0"}')
    assert (facts.models[0]["id"], facts.gauges.running, facts.gauges.kv_usage, facts.version) == (
        "m",
        3,
        0.5,
        "0.32.0",
    )


@pytest.mark.parametrize("version", [b"{}", b"[]", b'{"version": 7}', b"null"])
def test_a_version_that_is_not_told_is_empty(version: bytes) -> None:
    assert VLLM().facts(CARDS, b"", version).version == ""


@pytest.mark.parametrize(
    ("models", "metrics", "version"),
    [
        (b"", b"", b"{}"),
        (b'{"data": [{"id": ["x"]}]}', b"", b"{}"),
        (b'{"data": [{"id": null}]}', b"", b"{}"),
        (b'{"data": 5}', b"", b"{}"),
        (b"[]", b"", b"{}"),
        (CARDS, b"vllm:num_requests_running{\n", b"{}"),
        (CARDS, b"vllm:kv_cache_usage_perc\n", b"{}"),
        (CARDS, b"vllm:kv_cache_usage_perc x\n", b"{}"),
        (CARDS, b"", b"{"),
    ],
)
def test_what_is_not_the_answer_of_this_engine_is_a_value_error(models: bytes, metrics: bytes, version: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        VLLM().facts(models, metrics, version)


def test_the_simulator_speaks_as_vllm_does() -> None:
    leg = ENGINES["sim"].release_leg("m", {"transfer_id": "t"})
    assert leg == ENGINES["vllm"].release_leg("m", {"transfer_id": "t"})
    assert orjson.loads(orjson.dumps(leg))["kv_transfer_params"] == {"transfer_id": "t"}
