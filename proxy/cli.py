"""`pd-proxy`: the data plane by itself, in front of nodes that somebody else started."""

import logging
import os
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
import uvicorn
from pydantic import ValidationError

from engines import mooncake
from engines.base import Role, foreign_owners
from engines.topology import Node, Topology

from .app import make_app
from .config import ProxySettings
from .server import ClientProtocol
from .topology import TopologyError

EXIT_USAGE = 2

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
    min_prefill_tokens: Annotated[
        int, typer.Option(help="Answer prompts shorter than about this by a decode node alone.", min=0)
    ] = 0,
    allow_private_media: Annotated[  # noqa: FBT002
        bool, typer.Option("--allow-private-media", help="Fetch media for messages from private addresses too.")
    ] = False,
) -> None:
    """OpenAI-compatible proxy in front of prefill and decode nodes with the Mooncake transfer engine.

    PD_PROXY_API_KEYS (comma-separated): keys that clients must send. PD_NODE_API_KEY: the key the nodes want.
    """
    listed = {"connector": connector, "nodes": (*_prefill_nodes(prefill or []), *_decode_nodes(decode or []))}
    nodes = Topology.model_validate(listed)
    if topology is None and not (prefill and decode):
        raise UsageError("which nodes? Give --prefill and --decode at least once each, or --topology FILE")
    run(
        ProxySettings(
            host=host,
            port=port,
            topology_file=topology,
            topology=nodes,
            api_keys=tuple(filter(None, os.environ.get("PD_PROXY_API_KEYS", "").split(","))),
            node_api_key=os.environ.get("PD_NODE_API_KEY") or None,
            min_prefill_tokens=min_prefill_tokens,
            allow_private_media=allow_private_media,
        )
    )


def run(settings: ProxySettings) -> None:
    """Serve until a signal ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    uvicorn.run(
        make_app(settings),
        host=settings.host,
        port=settings.port,
        http=ClientProtocol,
        loop="uvloop",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_grace_s),
        backlog=2048,
    )


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
