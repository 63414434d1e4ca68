"""MultiConnector: MooncakeConnector hands over, and MooncakeStoreConnector keeps prefixes in a store shared by all.

A decode node loads from the first child that has something, which for a hand-off is MooncakeConnector; prefill nodes
save to the store and find there what another one computed. To the proxy it is MooncakeConnector.
Source: vLLM 0.32, kv_connector/v1/multi_connector.py.
"""

from ..base import JSONObject, NodeRole
from . import mooncake, mooncake_store
from .mooncake import Protocol

PLUGIN = "pd_counted_connector"


class MultiConnector(mooncake.MooncakeConnector):
    """To the proxy, its first child: the one that hands over."""

    needs_store = True
    transfer_engines = 2


def kv_transfer_config(
    role: NodeRole, protocol: Protocol, rdma_devices: tuple[str, ...] = (), *, on_cpu: bool
) -> JSONObject:
    """The value of vLLM's `--kv-transfer-config`.

    With vLLM's own MooncakeConnector as a child the first transfer kills the API server's output handler, because that
    child registers no metrics (vLLM #43828); the usual way out, `--disable-log-stats`, takes all metrics away, and with
    them the proof that KV moves. So the child is a subclass that registers them, loaded as a plug-in.
    """
    direct = mooncake.kv_transfer_config(role, protocol, rdma_devices, on_cpu=on_cpu)
    if not on_cpu:
        direct |= {"kv_connector": "CountedMooncakeConnector", "kv_connector_module_path": PLUGIN}
    shared = mooncake_store.kv_transfer_config(role, on_cpu=on_cpu)
    if role is not NodeRole.DECODE:
        shared["kv_role"] = "kv_both"  # it saves, and finds what others have saved (vLLM #42994)
    return {
        "kv_connector": "MultiConnector",
        "kv_role": direct["kv_role"],
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [direct, shared]},
    }
