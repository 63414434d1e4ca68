"""MooncakeStoreConnector: prefill saves KV blocks to a shared store, decode finds them by the hash of their content.

No parameters in either direction, nothing is pinned, nothing leaks. In return delivery is best effort: saving is
asynchronous and only full blocks are stored, so a decode node may find less than the whole prompt, or nothing, and
computes the rest. Source: vLLM 0.32, kv_connector/v1/mooncake/store/.
"""

import json
from dataclasses import dataclass

from ..base import JSONObject, NodeRole, Rank
from .mooncake import KV_ROLES, Protocol

MASTER = "mooncake_master"
_SEGMENT = "256MB"
_BUFFER = "64MB"


@dataclass(frozen=True, slots=True)
class HandOff:
    """Nothing to say: the order of the legs is all there is to it."""

    pins_kv: bool = False

    def prefill_params(self) -> None:
        return None

    def decode_params(self, answer: JSONObject) -> None:
        del answer


class MooncakeStoreConnector:
    """The connector, seen from the proxy."""

    moves_kv = True
    has_bootstrap = False
    is_best_effort = True
    needs_store = True
    transfer_engines = 1

    def hand_off(self, bootstrap: str | None, rank: Rank | None) -> HandOff:
        del bootstrap, rank
        return HandOff()


def kv_transfer_config(role: NodeRole, *, on_cpu: bool) -> JSONObject:
    """The value of vLLM's `--kv-transfer-config`."""
    config: JSONObject = {
        "kv_connector": "MooncakeStoreConnector",
        "kv_role": KV_ROLES[role],
        "kv_load_failure_policy": "recompute",
    }
    if on_cpu:
        config |= {"kv_connector": "CpuMooncakeStoreConnector", "kv_connector_module_path": "pd_cpu_connectors"}
    return config


def environment(config_file: str, client_ports: tuple[int, int]) -> dict[str, str]:
    """Environment of a node. `PYTHONHASHSEED`: block hashes, the store's keys, must be equal on every node."""
    first, last = (str(port) for port in client_ports)
    return {
        "MOONCAKE_CONFIG_PATH": config_file,
        "MC_STORE_CLIENT_MIN_PORT": first,
        "MC_STORE_CLIENT_MAX_PORT": last,
        "PYTHONHASHSEED": "0",
    }


def store_config(host: str, master_port: int, protocol: Protocol, rdma_devices: tuple[str, ...] = ()) -> str:
    """The file at `MOONCAKE_CONFIG_PATH`, the same for every node.

    P2PHANDSHAKE needs no metadata server, and outlives a restart of the master better (Mooncake #2246).
    """
    config = {
        "mode": "embedded",
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"{host}:{master_port}",
        "global_segment_size": _SEGMENT,
        "local_buffer_size": _BUFFER,
        "protocol": protocol,
        "device_name": ",".join(rdma_devices) if protocol == "rdma" else "",
        "local_hostname": host,
    }
    return json.dumps(config, indent=2)


def master_arguments(host: str, rpc_port: int, metrics_port: int) -> list[str]:
    """The command line behind `mooncake_master`."""
    return [f"--rpc_address={host}", f"--rpc_port={rpc_port}", f"--metrics_port={metrics_port}"]
