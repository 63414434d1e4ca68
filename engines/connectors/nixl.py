"""NixlConnector (pull): the prefill node answers where its KV lies, and the decode node is told just that.

Source: vLLM 0.32, kv_connector/v1/nixl/. The prefill node leases its blocks for 30 s and renews the lease on the
decode node's heartbeats, which begin when the request reaches it: the time between the legs must stay below that.
"""

from dataclasses import dataclass

from ..base import JSONObject, PrefillRefusedError, Rank

_NEEDED = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")


@dataclass(frozen=True, slots=True)
class HandOff:
    """The prefill node mints it; single use, since its blocks are freed when they were read."""

    pins_kv: bool = True

    def prefill_params(self) -> JSONObject:
        return {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }

    def decode_params(self, answer: JSONObject) -> JSONObject:
        """The prefill node's own parameters, unchanged. Raises PrefillRefusedError when it gave none."""
        params = answer.get("kv_transfer_params")
        if not isinstance(params, dict) or not all(params.get(key) is not None for key in _NEEDED):
            raise PrefillRefusedError("the prefill node's answer does not say where its KV lies")
        return params


class NixlConnector:
    """The connector, seen from the proxy."""

    moves_kv = True
    has_bootstrap = False
    is_best_effort = False
    needs_store = False
    transfer_engines = 0

    def hand_off(self, bootstrap: str | None, rank: Rank | None) -> HandOff:
        del bootstrap, rank
        return HandOff()
