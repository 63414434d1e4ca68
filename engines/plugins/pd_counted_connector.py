"""MooncakeConnector as a child of MultiConnector: it answers when it is asked for its metrics.

vLLM 0.32 asserts that every child whose transfers have statistics has registered Prometheus metrics, and
MooncakeConnector has not (multi_connector.py, `MultiKVConnectorPromMetrics.observe`; vLLM #43828). The assertion ends
the API server's output handler: requests hang, and /health stays 200. It also looks children up by the name of their
class (`build_kv_connector_stats`), so plug-ins have to be registered under it.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import MooncakeConnector


class _NotExported(KVConnectorPromMetrics):
    """Statistics of this child stay in the log line that vLLM writes of them."""

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        pass


class CountedMooncakeConnector(MooncakeConnector):
    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> KVConnectorPromMetrics:
        return _NotExported(*arguments)


KVConnectorFactory.register_connector("CountedMooncakeConnector", __name__, "CountedMooncakeConnector")
