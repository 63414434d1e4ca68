"""The decode side of a hand-off: find the prefill node through its bootstrap server, pull the KV."""

import asyncio

import httpx

from ..base import JSONObject
from ..connectors import mooncake

_MORE_THAN_PREFILL_WAITS_S = 60
"""A decode node waits this much longer than the prefill node's own timeout (mooncake_connector.py)."""


class TransferError(Exception):
    """The KV did not come; what follows is the node's `kv_load_failure_policy`."""


async def pull(client: httpx.AsyncClient, params: JSONObject, timeout_s: float) -> tuple[int, ...]:
    """The prompt whose KV was moved: token ids, as the prefill node computed them.

    Raises TransferError at once when the prefill node's server is gone, and only after the timeout when the engine id
    is of an earlier life or the transfer id unknown: the engine cannot tell those from a prefill still to come.
    """
    if "remote_bootstrap_addr" in params:  # MooncakeConnector
        server, transfer_id = str(params["remote_bootstrap_addr"]), params["transfer_id"]
        await _check_engine(client, server, params["remote_engine_id"], timeout_s)
    else:  # NixlConnector
        server = f"http://{params['remote_host']}:{params['remote_port']}"
        transfer_id = params["remote_request_id"]
    wanted = {"transfer_id": transfer_id, "engine_id": params["remote_engine_id"]}
    try:
        answer = await client.post(f"{server}/sim/pull", json=wanted, timeout=timeout_s + _MORE_THAN_PREFILL_WAITS_S)
    except httpx.HTTPError as exc:
        raise TransferError(f"pull from {server}: {exc!r}") from exc
    if answer.status_code != httpx.codes.OK:
        raise TransferError(f"transfer {transfer_id} timed out")
    return tuple(answer.json()["prompt_token_ids"])


async def _check_engine(client: httpx.AsyncClient, bootstrap: str, engine_id: str, timeout_s: float) -> None:
    try:
        query = await client.get(f"{bootstrap}/query")
        known = mooncake.engine_ids(query.raise_for_status().json())
    except (httpx.HTTPError, ValueError) as exc:
        raise TransferError(f"bootstrap server {bootstrap}: {exc!r}") from exc
    if engine_id not in known.values():
        await asyncio.sleep(timeout_s + _MORE_THAN_PREFILL_WAITS_S)
        raise TransferError(f"engine {engine_id} not found")
