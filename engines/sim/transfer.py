"""The decode side of a hand-off: find the prefill node through its bootstrap server, pull the KV."""

import asyncio

import httpx

from .. import mooncake
from ..base import JSONObject

_MORE_THAN_PREFILL_WAITS_S = 60
"""A decode node waits this much longer than the prefill node's own timeout (mooncake_connector.py)."""


class TransferError(Exception):
    """The KV did not come; what follows is the node's `kv_load_failure_policy`."""


async def pull(client: httpx.AsyncClient, params: JSONObject, timeout_s: float) -> tuple[int, ...]:
    """The prompt whose KV was moved: token ids, as the prefill node computed them.

    Raises TransferError at once when the bootstrap server is gone, and only after the timeout when the engine id is
    of an earlier life or the transfer id unknown: the engine cannot tell those from a prefill that is still coming.
    """
    bootstrap = str(params["remote_bootstrap_addr"])
    try:
        query = await client.get(f"{bootstrap}/query")
        known = mooncake.engine_ids(query.raise_for_status().json())
    except (httpx.HTTPError, ValueError) as exc:
        raise TransferError(f"bootstrap server {bootstrap}: {exc!r}") from exc
    if params["remote_engine_id"] not in known.values():
        await asyncio.sleep(timeout_s + _MORE_THAN_PREFILL_WAITS_S)
        raise TransferError(f"engine {params['remote_engine_id']} not found")
    try:
        answer = await client.post(
            f"{bootstrap}/sim/pull",
            json={"transfer_id": params["transfer_id"]},
            timeout=timeout_s + _MORE_THAN_PREFILL_WAITS_S,
        )
    except httpx.HTTPError as exc:
        raise TransferError(f"pull from {bootstrap}: {exc!r}") from exc
    if answer.status_code != httpx.codes.OK:
        raise TransferError(f"transfer {params['transfer_id']} timed out")
    return tuple(answer.json()["prompt_token_ids"])
