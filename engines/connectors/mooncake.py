"""MooncakeConnector: decode pulls a prompt's KV straight out of the prefill node's memory.

The engines agree on nothing by themselves: the proxy mints a `transfer_id`, gives it to the prefill node, and tells
the decode node whom to ask (`remote_engine_id`, found at the prefill node's bootstrap server). The prefill node
answers nothing in return. Source: vLLM 0.32, distributed/kv_transfer/kv_connector/v1/mooncake/mooncake_connector.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Literal

from ..base import JSONObject, NodeRole, Rank, new_id

DEFAULT_BOOTSTRAP_PORT = 8998
PORTS_PER_TRANSFER_ENGINE = 2
"""A transfer engine on TCP binds one port for its RPC and one for data (tcp_transport.cpp); RDMA needs the first."""

Protocol = Literal["tcp", "rdma"]


@dataclass(frozen=True, slots=True)
class HandOff:
    """What both legs of one attempt are told so that the KV finds its way.

    Single use: a retry is a new prefill with a new `HandOff`. Two engine requests under one `transfer_id` leak the
    first one's KV on the prefill node for good (mooncake_connector.py, `reqs_need_send`).
    """

    engine_id: str
    bootstrap: str
    transfer_id: str = field(default_factory=new_id)
    pins_kv: bool = True

    def prefill_params(self) -> JSONObject:
        return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": self.transfer_id}

    def decode_params(self, answer: JSONObject) -> JSONObject:
        """All three remote keys, always: one missing parks the request on the decode node for ever."""
        del answer  # its kv_transfer_params are always null
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": self.transfer_id,
            "remote_engine_id": self.engine_id,
            "remote_bootstrap_addr": self.bootstrap,
        }


class MooncakeConnector:
    """The connector, seen from the proxy."""

    moves_kv = True
    has_bootstrap = True
    is_best_effort = False
    needs_store = False
    transfer_engines = 1

    def hand_off(self, bootstrap: str | None, rank: Rank | None) -> HandOff:
        if bootstrap is None or rank is None:
            raise ValueError("a MooncakeConnector hand-off needs a bootstrap server and a rank")
        return HandOff(rank.engine_id, bootstrap)


def engine_ids(query: object) -> dict[int, str]:
    """The engine id of each data-parallel rank, from a bootstrap server's `GET /query`.

    `query` is the parsed answer: {"0": {"engine_id": "…", "worker_addr": {tp_rank: {pp_rank: "tcp://host:port"}}}}.
    A rank without workers is not ready and is left out; so is one behind a gap: ranks count from 0, and the server lets
    anybody register one. Raises ValueError when it is anything else.
    """
    if not isinstance(query, dict):
        raise ValueError(f"a bootstrap server's /query is an object, this is {type(query).__name__}")
    ids: dict[int, str] = {}
    for rank, entry in query.items():
        try:
            if entry["worker_addr"]:
                ids[int(rank)] = str(entry["engine_id"])
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"unexpected entry for rank {rank!r} in a bootstrap server's /query") from exc
    return {rank: ids[rank] for rank in takewhile(ids.__contains__, count())}


KV_ROLES = {NodeRole.PREFILL: "kv_producer", NodeRole.DECODE: "kv_consumer", NodeRole.BOTH: "kv_both"}


def kv_transfer_config(
    role: NodeRole, protocol: Protocol, rdma_devices: tuple[str, ...] = (), *, on_cpu: bool
) -> JSONObject:
    """The value of vLLM's `--kv-transfer-config`.

    `kv_load_failure_policy` "recompute": a transfer that fails becomes a slow right answer instead of an error
    (vLLM's own default, "fail", is a 500, or in a stream a 200 whose first event is an error); over TCP only where the
    decode node has no prefix cache, see `vllm.py`.
    `engine_id` is never set: it names one life of the process, and a decode node caches addresses by it.
    """
    config: JSONObject = {
        "kv_connector": "MooncakeConnector",
        "kv_role": KV_ROLES[role],
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"mooncake_protocol": protocol},
    }
    if rdma_devices and protocol == "rdma":
        config["kv_connector_extra_config"]["device_name"] = ",".join(rdma_devices)
    if on_cpu:
        config |= {"kv_connector": "CpuMooncakeConnector", "kv_connector_module_path": "pd_cpu_connectors"}
    return config


def environment(
    *, transfer_ports: tuple[int, int], bootstrap_port: int | None, protocol: Protocol, transfer_timeout_s: int
) -> dict[str, str]:
    """Environment of a node. `transfer_ports` is first and last, both included.

    The range has two spellings because Mooncake before 0.3.11 knew only the misspelt one; where neither is
    understood it falls back to 15000-17000 without a word.
    """
    first, last = (str(port) for port in transfer_ports)
    variables = {
        "MC_MIN_RPC_PORT": first,
        "MC_MAX_RPC_PORT": last,
        "MC_MIN_PRC_PORT": first,
        "MC_MAX_PRC_PORT": last,
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(transfer_timeout_s),
    }
    if bootstrap_port is not None:
        variables["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(bootstrap_port)
    if protocol == "tcp":
        variables["MC_FORCE_TCP"] = "1"  # else an adapter that is there is used, whatever the protocol says
        # One connection a transfer runs a busy node out of local ports (Mooncake #1954).
        variables["MC_TCP_ENABLE_CONNECTION_POOL"] = "true"
    return variables


def read_environment(variables: Mapping[str, str]) -> tuple[int, float]:
    """(bootstrap port, transfer timeout in seconds) as an engine reads them, with the engine's own defaults."""
    port = int(variables.get("VLLM_MOONCAKE_BOOTSTRAP_PORT", DEFAULT_BOOTSTRAP_PORT))
    return port, float(variables.get("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", "480"))
