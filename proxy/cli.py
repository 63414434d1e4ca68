"""`pd-proxy`: the data plane by itself, in front of nodes that somebody else started.

Its flags are made from `ProxySettings`: a setting is a field there, and nothing else.
"""

import inspect
import logging
import os
import signal
import ssl
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

import typer
import uvicorn
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from engines.base import NodeRole, foreign_owners
from engines.connectors import mooncake
from engines.topology import Node, Topology

from .downstream.protocol import ClientProtocol
from .nodes import topology as topology_file
from .nodes.topology import TopologyError
from .serving import tls, workers
from .serving.app import make_app
from .serving.exposition import own_version
from .serving.keys import KeyRing, KeysError
from .serving.tls import CertificateError
from .settings import ProxySettings

EXIT_USAGE = 2

logger = logging.getLogger("pd_proxy")

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_NO_FLAGS = frozenset({"topology", "api_keys", "node_api_key", "admin_key"})
"""Nodes have flags of their own, and secrets come from the environment."""
_FLAG_NAMES = {"topology_file": "topology"}
_SECRETS = {"node_api_key": "PD_NODE_API_KEY", "admin_key": "PD_PROXY_ADMIN_KEY"}
_KEYS = "PD_PROXY_API_KEYS"


class UsageError(Exception):
    """One line for the person at the terminal; exit code 2."""


def flag(field: str) -> str:
    """Of a setting, as it is typed."""
    return "--" + _FLAG_NAMES.get(field, field).replace("_", "-")


def flagged_settings() -> dict[str, FieldInfo]:
    """The settings that have a flag, by field."""
    return {name: field for name, field in ProxySettings.model_fields.items() if name not in _NO_FLAGS}


def _serve(**given: Any) -> None:
    """OpenAI-compatible proxy in front of prefill and decode nodes with the Mooncake transfer engine.

    Secrets come from the environment, never from flags. PD_PROXY_API_KEYS (comma-separated): keys that clients must
    send, or --api-keys-file. PD_NODE_API_KEY: the key the nodes want. PD_PROXY_ADMIN_KEY: the admin listener's.
    """
    del given["version"]
    config, only_check = given.pop("config"), given.pop("check")
    told = {name: value for name, value in given.items() if value is not None}
    settings = settings_from((_in_file(config) if config is not None else {}) | told, os.environ)
    if only_check:
        KeyRing(settings.api_keys, settings.api_keys_file)
        if settings.tls_certificate and settings.tls_key:
            tls.context(settings.tls_certificate, settings.tls_key)
    else:
        run(settings)


def settings_from(told: Mapping[str, Any], environment: Mapping[str, str]) -> ProxySettings:
    """The settings that flags and file name, `topology` for the file of nodes. Raises UsageError, ValidationError."""
    values = dict(told)
    prefill, decode, both = (values.pop(role.value, None) or [] for role in NodeRole)
    connector = values.pop("connector", "MooncakeConnector")
    values["topology_file"] = values.pop("topology", None)
    can_hand_over = (prefill or both) and (decode or both) and len(prefill + decode + both) > 1
    if values["topology_file"] is None and not can_hand_over:
        raise UsageError(
            "which nodes? Give --prefill and --decode at least once each, --both at least twice, or --topology FILE"
        )
    nodes = (*_with_bootstrap(NodeRole.PREFILL, prefill), *_decode_nodes(decode), *_with_bootstrap(NodeRole.BOTH, both))
    listed = {"connector": connector, "nodes": nodes}
    values["topology"] = Topology.model_validate(listed)
    values["api_keys"] = _keys_in(environment)
    values |= {name: environment.get(variable) or None for name, variable in _SECRETS.items()}
    return ProxySettings.model_validate(values)


def run(settings: ProxySettings) -> None:
    """Serve until a signal ends it."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "http": ClientProtocol,
        "ws": "none",
        "loop": "proxy.downstream.listener:Loop",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": int(settings.shutdown_grace_s),
        "backlog": 2048,
    }
    if settings.tls_certificate and settings.tls_key:
        tls.context(settings.tls_certificate, settings.tls_key)  # what is wrong with it is said once, here
        options["ssl_context_factory"] = partial(_tls_context, settings.tls_certificate, settings.tls_key)
    for ending in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it once more when it has shut down
        signal.signal(ending, lambda *_: sys.exit(0))
    with _nodes_in_a_file(settings) as final:
        application = make_app(final)  # as above
        workers.prepare(final)
        _tell_settings(final)
        if final.workers == 1:
            uvicorn.run(application, **options)
        else:
            with workers.told(final):
                uvicorn.run("proxy.serving.workers:make", factory=True, workers=final.workers, **options)


def _tls_context(certificate: Path, key: Path, config: uvicorn.Config, default: Callable[[], Any]) -> ssl.SSLContext:
    del config, default
    return tls.context(certificate, key)


@contextmanager
def _nodes_in_a_file(settings: ProxySettings) -> Iterator[ProxySettings]:
    """With an admin listener the nodes live in a file, which all workers follow."""
    if settings.admin_port is None or settings.topology_file is not None:
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="pd-proxy-") as folder:
        file = Path(folder) / "topology.json"
        topology_file.write(file, settings.topology)
        yield settings.model_copy(update={"topology_file": file, "topology": Topology()})


def _tell_settings(settings: ProxySettings) -> None:
    """At start: a warning where anybody may come in, and what is not as by default."""
    if settings.host not in ("localhost", "127.0.0.1", "::1") and not settings.needs_key:
        logger.warning("anyone who reaches %s:%d may use it: set %s", settings.host, settings.port, _KEYS)
    fields = ProxySettings.model_fields
    told = {name: getattr(settings, name) for name in flagged_settings()}
    unusual = [f"{flag(name)} {value}" for name, value in told.items() if value != fields[name].default]
    nodes = [f"{node.name} {node.url}" for node in settings.topology.nodes]
    logger.info("pd-proxy %s on %s:%d", own_version(), settings.host, settings.port)
    logger.info("settings: %s", "; ".join((*nodes, *unusual)) or "all by default")


def _keys_in(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Raises UsageError when the variable is there and has no key: nobody serves openly by mistake."""
    if _KEYS not in environment:
        return ()
    keys = tuple(key.strip() for key in environment[_KEYS].split(",") if key.strip())
    if not keys:
        raise UsageError(f"{_KEYS} is set and has no key in it; unset it to serve without keys")
    return keys


def _in_file(file: Path) -> dict[str, Any]:
    """Settings by their names, flags without dashes; secrets are not among them. Raises UsageError."""
    try:
        told = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read {file}: {getattr(exc, 'strerror', None) or 'no text'}") from exc
    except yaml.YAMLError as exc:
        raise UsageError(f"{file} is not YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(told, dict):
        raise UsageError(f"{file} is no list of settings")
    known = {_FLAG_NAMES.get(name, name) for name in flagged_settings()} | {*NodeRole, "connector"}
    found = {str(name).replace("-", "_"): value for name, value in told.items()}
    for name in found.keys() - known:
        raise UsageError(f"{file}: there is no setting {name!r} (secrets come from the environment)")
    if isinstance(found.get("topology"), str):
        found["topology"] = Path(found["topology"])
    return found


def _with_bootstrap(role: NodeRole, values: list[str]) -> list[Node]:
    nodes = []
    for number, value in enumerate(values):
        url, _, port = value.partition(" ")
        if port in ("", "none", "None"):
            port = str(mooncake.DEFAULT_BOOTSTRAP_PORT)
        host = urlsplit(url).hostname or ""
        bootstrap = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        nodes.append(Node(name=f"{role}-{number}", role=role, url=url, bootstrap=bootstrap))
    return nodes


def _decode_nodes(values: list[str]) -> list[Node]:
    return [Node(name=f"decode-{number}", role=NodeRole.DECODE, url=url) for number, url in enumerate(values)]


# -- the command line


def _show_version(wanted: bool) -> None:  # noqa: FBT001  typer calls it so
    if wanted:
        typer.echo(f"pd-proxy {own_version()}")
        raise typer.Exit


def _parameters() -> Iterator[inspect.Parameter]:
    prefill = typer.Option(
        metavar="URL [BOOTSTRAP_PORT]",
        help="A prefill node, and the port of its bootstrap server (8998 when left away). Repeat for more.",
    )
    yield _parameter("prefill", list[str] | None, prefill)
    yield _parameter("decode", list[str] | None, typer.Option(metavar="URL", help="A decode node. Repeat for more."))
    both = typer.Option(metavar="URL [BOOTSTRAP_PORT]", help="A node that does both, likewise. Repeat for more.")
    yield _parameter("both", list[str] | None, both)
    connector = typer.Option(metavar="NAME", help="The nodes' KV connector, when they are given by flags.")
    yield _parameter("connector", str | None, connector)
    config = typer.Option(metavar="FILE", help="Settings from a YAML file; flags come before them.")
    yield _parameter("config", Path | None, config)
    for name, field in flagged_settings().items():
        yield _parameter(_FLAG_NAMES.get(name, name), *_option(name, field))
    check = typer.Option("--check", help="See that flags, file and environment are right, and exit.")
    yield _parameter("check", bool | None, check)
    version = typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    yield _parameter("version", bool | None, version)


def _option(name: str, field: FieldInfo) -> tuple[Any, Any]:
    """(type, option) of a setting's flag."""
    kind = _without_none(field.annotation)
    default = "" if field.default in (None, ()) else f" [default: {shown(field.default)}]"
    text = f"{field.description}{default}"
    if kind is bool:
        names = (flag(name),) if field.default is False else (f"{flag(name)}/--no-{flag(name)[2:]}",)
        return bool | None, typer.Option(*names, help=text)
    if get_origin(kind) is Literal:
        return str | None, typer.Option(flag(name), metavar="|".join(get_args(kind)), help=text)
    if get_origin(kind) is tuple:
        return str | None, typer.Option(flag(name), metavar="A,B", help=text)
    metavar = {Path: "FILE", int: "N", float: "SECONDS" if name.endswith("_s") else "X"}.get(kind, "TEXT")
    return kind | None, typer.Option(flag(name), metavar=metavar, help=text)


def shown(default: Any) -> str:
    """A setting's default, as it would be typed."""
    return ",".join(default) if isinstance(default, tuple) else str(default).lower()


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def _command() -> Callable[..., None]:
    parameters = list(_parameters())
    _serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return _serve


app.command(name="serve")(_command())


def main() -> None:
    """The console script."""
    try:
        others = foreign_owners(packages_distributions())
        if others:
            raise UsageError(f"these installed packages take our names: {others}. Use an environment of its own")
        app(args=_join_bootstrap_ports(sys.argv[1:]))
    except (UsageError, TopologyError, KeysError, CertificateError) as exc:
        _die(str(exc))
    except ValidationError as exc:
        _die("; ".join(_in_words(error["loc"], error["msg"]) for error in exc.errors()))


def _in_words(place: tuple[int | str, ...], message: str) -> str:
    """A wrong value, with the flag that it came by."""
    message = message.removeprefix("Value error, ")
    name = str(place[0]) if place else ""
    return f"{flag(name)}: {message}" if name in flagged_settings() else message


def _die(message: str) -> None:
    print(f"pd-proxy: {message}", file=sys.stderr)  # noqa: T201
    raise SystemExit(EXIT_USAGE)


def _join_bootstrap_ports(args: list[str]) -> list[str]:
    """`--prefill URL PORT`, as vLLM's example proxy takes it, becomes one value: `--prefill "URL PORT"`; so does
    `--both URL PORT`.
    """
    joined: list[str] = []
    for arg in args:
        if len(joined) >= 2 and joined[-2] in ("--prefill", "--both") and (arg.isdigit() or arg.lower() == "none"):
            joined[-1] += f" {arg}"
        else:
            joined.append(arg)
    return joined


if __name__ == "__main__":
    main()
