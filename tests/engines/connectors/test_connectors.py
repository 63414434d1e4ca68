"""MooncakeConnector: hand-off, identity, configuration."""

import json
from typing import Any

import pytest

from engines.base import NodeRole, PrefillRefusedError
from engines.connectors import mooncake, mooncake_store, nixl
from engines.connectors.names import CONNECTORS


def test_both_legs_of_a_hand_off_agree() -> None:
    hand_off = mooncake.HandOff(engine_id="e", bootstrap="http://10.0.0.1:8998")
    prefill, decode = hand_off.prefill_params(), hand_off.decode_params({})
    assert prefill["transfer_id"] == decode["transfer_id"]
    assert (prefill["do_remote_decode"], prefill["do_remote_prefill"]) == (True, False)
    assert (decode["do_remote_decode"], decode["do_remote_prefill"]) == (False, True)
    assert decode["remote_engine_id"] == "e"
    assert decode["remote_bootstrap_addr"] == "http://10.0.0.1:8998"


def test_no_two_hand_offs_share_an_id() -> None:
    ids = {mooncake.HandOff("e", "http://h:1").transfer_id for _ in range(100)}
    assert len(ids) == 100


def test_identity_is_read_from_what_a_real_bootstrap_server_answers() -> None:
    query = {"0": {"engine_id": "a71d2c77", "worker_addr": {"0": {"0": "tcp://127.0.0.1:38065"}}}}
    assert mooncake.engine_ids(query) == {0: "a71d2c77"}


def test_a_rank_without_workers_is_not_ready() -> None:
    assert mooncake.engine_ids({"0": {"engine_id": "e", "worker_addr": {}}}) == {}


@pytest.mark.parametrize(("ranks", "known"), [("01", [0, 1]), ("07", [0]), ("1", []), ("10", [0, 1])])
def test_a_rank_behind_a_gap_is_a_strangers_or_too_early(ranks: str, known: list[int]) -> None:
    query = {rank: {"engine_id": "e", "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}} for rank in ranks}
    assert list(mooncake.engine_ids(query)) == known


@pytest.mark.parametrize("query", [[], None, {"x": {"engine_id": "e", "worker_addr": {1: 1}}}, {"0": 5}, {"0": {}}])
def test_anything_else_is_an_error_and_not_an_empty_identity(query: Any) -> None:
    with pytest.raises(ValueError, match="/query"):
        mooncake.engine_ids(query)


def test_the_roles_are_the_engines_own_words() -> None:
    prefill = mooncake.kv_transfer_config(NodeRole.PREFILL, "rdma", on_cpu=False)
    decode = mooncake.kv_transfer_config(NodeRole.DECODE, "rdma", on_cpu=False)
    assert (prefill["kv_role"], decode["kv_role"]) == ("kv_producer", "kv_consumer")
    assert prefill["kv_connector"] == "MooncakeConnector"
    assert "kv_connector_module_path" not in prefill


def test_the_engine_id_is_never_pinned() -> None:
    assert "engine_id" not in mooncake.kv_transfer_config(NodeRole.PREFILL, "tcp", on_cpu=True)


def test_the_transfer_range_is_told_in_both_spellings() -> None:
    variables = mooncake.environment(
        transfer_ports=(20000, 20015), bootstrap_port=None, protocol="rdma", transfer_timeout_s=60
    )
    assert variables["MC_MIN_RPC_PORT"] == variables["MC_MIN_PRC_PORT"] == "20000"
    assert variables["MC_MAX_RPC_PORT"] == variables["MC_MAX_PRC_PORT"] == "20015"
    assert "VLLM_MOONCAKE_BOOTSTRAP_PORT" not in variables


def test_a_mooncake_hand_off_needs_an_identity() -> None:
    with pytest.raises(ValueError, match="bootstrap server and a rank"):
        CONNECTORS["MooncakeConnector"].hand_off(None, None)


def test_a_nixl_hand_off_is_what_the_prefill_node_answered() -> None:
    told = {"remote_engine_id": "e", "remote_block_ids": [[1]], "remote_host": "h", "remote_port": 5600, "more": 1}
    hand_off = nixl.HandOff()
    assert hand_off.prefill_params()["do_remote_decode"] is True
    assert hand_off.decode_params({"kv_transfer_params": told}) == told


@pytest.mark.parametrize("params", [None, {}, [], {"remote_engine_id": "e"}, {"remote_engine_id": None}])
def test_a_nixl_answer_without_coordinates_is_no_hand_off(params: Any) -> None:
    with pytest.raises(PrefillRefusedError, match="where its KV lies"):
        nixl.HandOff().decode_params({"kv_transfer_params": params})


def test_through_a_store_nothing_is_said_and_nothing_pinned() -> None:
    hand_off = CONNECTORS["MooncakeStoreConnector"].hand_off(None, None)
    assert (hand_off.prefill_params(), hand_off.decode_params({}), hand_off.pins_kv) == (None, None, False)


def test_the_stores_configuration_is_valid_json_with_every_field_the_engine_wants() -> None:
    config = json.loads(mooncake_store.store_config("10.0.0.1", 8700, "tcp"))
    assert config["master_server_address"] == "10.0.0.1:8700"
    assert config["protocol"] == "tcp"
    assert config["metadata_server"] == "P2PHANDSHAKE"
