"""Command line of a simulated node: `python -m engines.sim` takes what vLLM's API server takes.

Flags it has no use for are accepted, so that a command line meant for vLLM starts a simulator unchanged.
"""

import argparse
import asyncio
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..base import NodeRole
from ..connectors import mooncake
from .faults import Faults
from .kv import TOTAL_BLOCKS
from .server import Settings, SimNode, make_app, make_bootstrap_app
from .timing import Speeds

_ROLES = {kv_role: role for role, kv_role in mooncake.KV_ROLES.items()}


class _Protocol(HttpToolsProtocol):
    """Lets a fault close the connection under the application."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["sim.transport"] = self.transport  # type: ignore[typeddict-unknown-key]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engines.sim", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="sim")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-gpu-blocks-override", type=int, default=TOTAL_BLOCKS)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--as-version", default="sim", help="of vLLM, to behave as")
    parser.add_argument("--faults", type=Faults.model_validate_json, default=Faults(), help="from the start, as JSON")
    parser.add_argument("--speeds", type=Speeds.model_validate_json, help="how long it takes, as JSON: timing.py")
    parser.add_argument("--kv-transfer-config", type=json.loads, default={})
    options, _ = parser.parse_known_args()
    asyncio.run(_Server(options).run())


def _caches(options: argparse.Namespace, role: NodeRole | None) -> bool:
    """As pd-launch starts them over TCP, decode nodes do not."""
    return role is not NodeRole.DECODE if options.enable_prefix_caching is None else options.enable_prefix_caching


class _BootstrapServer(uvicorn.Server):
    """Ends when the API server does, which is the one that hears signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    """The API server of a node, and on a prefill node its bootstrap server."""

    def __init__(self, options: argparse.Namespace) -> None:
        bootstrap_port, timeout_s = mooncake.read_environment(os.environ)
        config = options.kv_transfer_config
        settings = Settings(
            names=tuple(options.served_model_name or [options.model]),
            role=_ROLES.get(config.get("kv_role")),
            max_model_len=options.max_model_len,
            load_failure_policy=config.get("kv_load_failure_policy", "fail"),
            transfer_timeout_s=timeout_s,
            address=(options.host, options.port),
            bootstrap_port=bootstrap_port,
            ranks=options.data_parallel_size,
            layout={
                "block_size": str(options.block_size),
                "cache_dtype": options.kv_cache_dtype,
                "num_gpu_blocks": str(options.num_gpu_blocks_override),
                "enable_prefix_caching": str(_caches(options, _ROLES.get(config.get("kv_role")))),
            },
            version=options.as_version,
            speeds=options.speeds,
            is_nixl=config.get("kv_connector") == "NixlConnector",
        )
        self._address = (options.host, options.port)
        self._bootstrap_address = ("0.0.0.0", bootstrap_port)  # noqa: S104  where vLLM's listens too
        self._refuse_s = 0.0
        self._node = SimNode(settings, stop_listening=self._stop_listening)
        self._node.faults = options.faults
        self._api: uvicorn.Server | None = None

    async def run(self) -> None:
        bootstrap = None
        if self._node.settings.role not in (None, NodeRole.DECODE):
            bootstrap = _BootstrapServer(_config(make_bootstrap_app(self._node)))
            bootstrap_task = asyncio.create_task(bootstrap.serve([_listen(self._bootstrap_address)]))
        app = make_app(self._node)
        while True:
            self._refuse_s = 0.0
            self._api = uvicorn.Server(_config(app))
            await self._api.serve([_listen(self._address)])
            if not self._refuse_s:
                break
            await asyncio.sleep(self._refuse_s)
        if bootstrap:
            bootstrap.should_exit = True
            await bootstrap_task

    def _stop_listening(self, seconds: float) -> None:
        """Close the listener and every connection, once the answer to the control request is out."""
        api = self._api
        assert api is not None  # noqa: S101  it is serving the request that brought us here
        self._refuse_s = seconds

        def stop() -> None:
            api.should_exit = api.force_exit = True

        asyncio.get_running_loop().call_later(0.05, stop)


def _listen(address: tuple[str, int]) -> socket.socket:
    """Said to be TCP: else asyncio leaves Nagle's algorithm on, and an answer's body waits 40 ms behind its head."""
    listener = socket.socket(
        socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(2048)
    return listener


def _config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(app, http=_Protocol, log_level="info", access_log=False, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
