"""`pd-proxy`: the data plane by itself, in front of nodes that somebody else started."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
import uvicorn
from pydantic import ValidationError

from engines.base import Role, foreign_owners
from engines.connectors import mooncake
from engines.topology import Node, Topology

from .downstream.protocol import ClientProtocol
from .nodes.topology import TopologyError
from .serving import admin, workers
from .serving.app import make_app
from .settings import ProxySettings

EXIT_USAGE = 2

logger = logging.getLogger("pd_proxy")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class UsageError(Exception):
    """One line for the person at the terminal; exit code 2."""


@app.command()
def serve(  # noqa: PLR0913, PLR0917  a command's flags
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL [BOOTSTRAP_PORT]",
            help="A prefill node, and the port of its bootstrap server (8998 when left away). Repeat for more.",
        ),
    ] = None,
    decode: Annotated[list[str] | None, typer.Option(metavar="URL", help="A decode node. Repeat for more.")] = None,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the nodes from this file, and follow its changes.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    connector: Annotated[
        str, typer.Option(metavar="NAME", help="The nodes' KV connector, when they are given by flags.")
    ] = "MooncakeConnector",
    workers: Annotated[
        int, typer.Option(metavar="N", help="Processes that share the port and the load.", min=1, max=64)
    ] = 1,
    min_prefill_tokens: Annotated[
        int, typer.Option(help="Answer prompts shorter than about this by a decode node alone.", min=0)
    ] = 0,
    without_prefill: Annotated[
        str,
        typer.Option(
            metavar="aggregated|refuse",
            help="When no prefill node is usable: let decode nodes compute prompts too, or refuse (503).",
        ),
    ] = "aggregated",
    resume: Annotated[  # noqa: FBT002
        bool, typer.Option(help="Go on with a stream that loses its decode node in the middle, from another.")
    ] = True,
    prefill_timeout_s: Annotated[float, typer.Option(help="For a whole prefill leg.")] = 600,
    decode_start_timeout_s: Annotated[
        float, typer.Option(help="From the hand-off to decode's first event; below the engines' transfer timeout.")
    ] = 50,
    decode_silence_timeout_s: Annotated[float, typer.Option(help="Between two chunks of a running answer.")] = 120,
    request_timeout_s: Annotated[
        float, typer.Option(help="For a whole request; clients may ask for less (x-request-timeout).")
    ] = 3600,
    shutdown_delay_s: Annotated[
        float, typer.Option(help="After SIGTERM, serve so long with /health at 503, for a load balancer to notice.")
    ] = 0,
    shutdown_grace_s: Annotated[float, typer.Option(help="How long running answers may go on after SIGTERM.")] = 30,
    head_timeout_s: Annotated[float, typer.Option(help="For a request's head to come.")] = 10,
    body_timeout_s: Annotated[float, typer.Option(help="Between two pieces of a request's body.")] = 30,
    client_stall_timeout_s: Annotated[
        float, typer.Option(help="A client that takes no byte of its answer for so long loses it.")
    ] = 120,
    max_in_flight: Annotated[int, typer.Option(help="Requests inside at once, in each worker.")] = 4096,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait for a place; more get a 429.")] = 1024,
    queue_timeout_s: Annotated[float, typer.Option(help="How long one may wait.")] = 30,
    max_node_in_flight: Annotated[int, typer.Option(help="Requests on one decode node.")] = 2048,
    api_keys_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients' keys, one a line; '#' begins a comment.")
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Add, drain and remove nodes at run time here (PD_PROXY_ADMIN_KEY).")
    ] = None,
    admin_host: Annotated[str, typer.Option(help="Address of the admin listener.")] = "127.0.0.1",
    tls_certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="Serve HTTPS (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key (PEM).")] = None,
    log_requests: Annotated[  # noqa: FBT002
        bool, typer.Option("--log-requests", help="One log line for every request, not only for those that failed.")
    ] = False,
    log_format: Annotated[str, typer.Option(metavar="text|json", help="Of log lines.")] = "text",
    allow_private_media: Annotated[  # noqa: FBT002
        bool, typer.Option("--allow-private-media", help="Fetch media for messages from private addresses too.")
    ] = False,
) -> None:
    """OpenAI-compatible proxy in front of prefill and decode nodes with the Mooncake transfer engine.

    Secrets come from the environment, never from flags. PD_PROXY_API_KEYS (comma-separated): keys that clients must
    send, or --api-keys-file. PD_NODE_API_KEY: the key the nodes want. PD_PROXY_ADMIN_KEY: the admin listener's.
    """
    listed = {"connector": connector, "nodes": (*_prefill_nodes(prefill or []), *_decode_nodes(decode or []))}
    nodes = Topology.model_validate(listed)
    if topology is None and not (prefill and decode):
        raise UsageError("which nodes? Give --prefill and --decode at least once each, or --topology FILE")
    run(
        ProxySettings(
            host=host,
            port=port,
            workers=workers,
            topology_file=topology,
            topology=nodes,
            api_keys=(*_keys_in(api_keys_file), *filter(None, os.environ.get("PD_PROXY_API_KEYS", "").split(","))),
            admin_port=admin_port,
            admin_host=admin_host,
            admin_key=os.environ.get("PD_PROXY_ADMIN_KEY") or None,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            log_requests="all" if log_requests else "failed",
            log_format=log_format,
            node_api_key=os.environ.get("PD_NODE_API_KEY") or None,
            min_prefill_tokens=min_prefill_tokens,
            without_prefill=without_prefill,
            resume=resume,
            prefill_timeout_s=prefill_timeout_s,
            decode_start_timeout_s=decode_start_timeout_s,
            decode_silence_timeout_s=decode_silence_timeout_s,
            request_timeout_s=request_timeout_s,
            shutdown_delay_s=shutdown_delay_s,
            shutdown_grace_s=shutdown_grace_s,
            client_stall_timeout_s=client_stall_timeout_s,
            head_timeout_s=head_timeout_s,
            body_timeout_s=body_timeout_s,
            max_in_flight=max_in_flight,
            max_queue=max_queue,
            queue_timeout_s=queue_timeout_s,
            max_node_in_flight=max_node_in_flight,
            allow_private_media=allow_private_media,
        )
    )


def run(settings: ProxySettings) -> None:
    """Serve until a signal ends it."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "http": ClientProtocol,
        "loop": "proxy.downstream.listener:Loop",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": int(settings.shutdown_grace_s),
        "backlog": 2048,
        "ssl_certfile": settings.tls_certificate,
        "ssl_keyfile": settings.tls_key,
    }
    for ending in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it once more when it has shut down
        signal.signal(ending, lambda *_: sys.exit(0))
    with _nodes_in_a_file(settings) as final:
        application = make_app(final)  # what is wrong with the settings is said once, here
        workers.prepare(final)
        _warn(final)
        if final.workers == 1:
            uvicorn.run(application, **options)
        else:
            with workers.told(final):
                uvicorn.run("proxy.serving.workers:make", factory=True, workers=final.workers, **options)


@contextmanager
def _nodes_in_a_file(settings: ProxySettings) -> Iterator[ProxySettings]:
    """With an admin listener the nodes live in a file, which all workers follow."""
    if settings.admin_port is None or settings.topology_file is not None:
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="pd-proxy-") as folder:
        file = Path(folder) / "topology.json"
        admin.write(file, settings.topology)
        yield settings.model_copy(update={"topology_file": file, "topology": Topology()})


def _warn(settings: ProxySettings) -> None:
    is_open = settings.host not in ("localhost", "127.0.0.1", "::1")
    if is_open and not settings.api_keys:
        logger.warning("anyone who reaches %s:%d may use it: set PD_PROXY_API_KEYS", settings.host, settings.port)


def _keys_in(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.split("#", 1)[0].strip() for line in file.read_text().splitlines()]
    except OSError as exc:
        raise UsageError(f"cannot read the keys in {file}: {exc.strerror}") from exc
    if not any(lines):
        raise UsageError(f"{file} has no key in it")
    return [line for line in lines if line]


def main() -> None:
    """The console script."""
    try:
        others = foreign_owners(packages_distributions())
        if others:
            raise UsageError(f"these installed packages take our names: {others}. Use an environment of its own")
        app(args=_join_bootstrap_ports(sys.argv[1:]))
    except (UsageError, TopologyError) as exc:
        _die(str(exc))
    except ValidationError as exc:
        _die("; ".join(str(error["msg"]) for error in exc.errors()))


def _die(message: str) -> None:
    print(f"pd-proxy: {message}", file=sys.stderr)  # noqa: T201
    raise SystemExit(EXIT_USAGE)


def _join_bootstrap_ports(args: list[str]) -> list[str]:
    """`--prefill URL PORT`, as vLLM's example proxy takes it, becomes one value: `--prefill "URL PORT"`."""
    joined: list[str] = []
    for arg in args:
        if len(joined) >= 2 and joined[-2] == "--prefill" and (arg.isdigit() or arg.lower() == "none"):
            joined[-1] += f" {arg}"
        else:
            joined.append(arg)
    return joined


def _prefill_nodes(values: list[str]) -> list[Node]:
    nodes = []
    for number, value in enumerate(values):
        url, _, port = value.partition(" ")
        if port in ("", "none", "None"):
            port = str(mooncake.DEFAULT_BOOTSTRAP_PORT)
        host = urlsplit(url).hostname or ""
        bootstrap = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        nodes.append(Node(name=f"prefill-{number}", role=Role.PREFILL, url=url, bootstrap=bootstrap))
    return nodes


def _decode_nodes(values: list[str]) -> list[Node]:
    return [Node(name=f"decode-{number}", role=Role.DECODE, url=url) for number, url in enumerate(values)]


if __name__ == "__main__":
    main()
