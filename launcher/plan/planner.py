"""From the configuration and the facts of a host to the plan: pure, and the same for the same input."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

from engines.base import NodeRole
from engines.connectors import mooncake, mooncake_store
from engines.known import ENGINES
from engines.vllm import command

from .config import TINY_MODEL, LaunchConfig
from .devices import left_over
from .facts import HostFacts, rdma_problem
from .plan import Download, NodeProcess, Plan, Process
from .seats import (
    ANY,
    Port,
    Room,
    Seat,
    admin_host,
    check_ranges,
    has_store,
    seat_for,
    seats_of,
    store_client_ports_drawn,
    transfer_ports_drawn,
)

_WAITS_FOR_KV = 5 / 6
"""Share of the engines' transfer timeout that the proxy waits for decode's first event: it must know first."""
_DEFAULT_PATH = "/bin:/usr/bin"
"""What programs are looked for in where PATH is not set (execvp)."""
_STORE_FILE = "mooncake.json"
_PROXY_GRACE_S = 30.0
"""pd-proxy's own default of --shutdown-grace-s."""
_PROXY_ENDS_S = 10.0
_OF_OUR_OWN = ("PATH", "HOME", "LANG", "TZ", "USER", "TMPDIR", "NO_COLOR")
_OF_OUR_OWN_BEGINNINGS = ("PYTHON", "LC_", "LD_", "SSL_", "OTEL_", "COVERAGE_", "XDG_")
_OF_THE_PROXY = ("PD_PROXY_", "PD_NODE_")
_OF_THE_STORE = ("MC_", "MOONCAKE_", "GLOG_")
_NOT_FROM_THE_HUB = ("--load-format", "--model-loader-extra-config", "--download-dir", "--hf-token")
"""With these a model may lie anywhere, and the engine fetches it in its own way."""


def make_plan(config: LaunchConfig, facts: HostFacts, seats: Sequence[Seat] = ()) -> Plan:
    """`seats`: the ports and devices to give out, of a run that is to be repeated; else they are chosen here.

    Raises ConfigError when the configuration cannot be carried out on any host, or not on this one, and PortBusyError
    when too many ports of a range are taken.
    """
    check_ranges(config)
    room = Room(config, facts)
    run_dir = (config.run_dir or facts.new_run_dir).expanduser().absolute()
    temporary = facts.temporary / f"pdl-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]}"
    chosen = tuple(seats) or tuple(seats_of(config, facts, room))
    nodes = tuple(_node(config, facts, seat, run_dir, temporary) for seat in chosen)
    store = room.take("store_ports", 2) if has_store(config) else 0
    admin = room.take("admin_ports")
    protocol, why = _protocol(config, facts)
    return Plan(
        engine=config.engine,
        engine_python=_engine_python(config, facts),
        device=config.device,
        connector=config.connector,
        protocol=protocol,
        protocol_why=why,
        services=tuple(_services(config, facts, run_dir, store)),
        files=_files(config, facts, store),
        model=_model_argument(config, facts),
        download=_download(config, facts),
        served_names=served_names(config),
        run_dir=run_dir,
        temporary=temporary,
        nodes=nodes,
        proxy=_proxy(config, facts, run_dir, admin),
        proxy_url=_url(_address(facts, config.proxy_host), config.proxy_port),
        admin_url=_url(admin_host(config), admin),
        passed_over=tuple(room.passed_over),
    )


def another_node(plan: Plan, config: LaunchConfig, facts: HostFacts, role: NodeRole) -> NodeProcess:
    """A further node of a role for a plan that runs. Raises ConfigError or PortBusyError."""
    names = {node.name for node in plan.nodes}
    name = next(name for number in count() if (name := f"{role}-{number}") not in names)
    used = [device for node in plan.nodes for device in node.devices]
    devices = left_over(config, facts, role, used, len(plan.of_kind(role)[0].devices))
    seat = seat_for(config, Room(config, facts), name, role, devices)
    return _node(_as_decided(config, plan), facts, seat, plan.run_dir, plan.temporary)


def moved_node(plan: Plan, config: LaunchConfig, facts: HostFacts, node: NodeProcess) -> NodeProcess:
    """The same node on other ports. Raises PortBusyError when none is left."""
    seat = seat_for(config, Room(config, facts), node.name, node.role, node.devices)
    return _node(_as_decided(config, plan), facts, seat, plan.run_dir, plan.temporary)


def _as_decided(config: LaunchConfig, plan: Plan) -> LaunchConfig:
    """All nodes of a run move KV in one way, whatever has become of an adapter meanwhile."""
    return config.model_copy(update={"transfer_protocol": plan.protocol})


def _node(config: LaunchConfig, facts: HostFacts, seat: Seat, run_dir: Path, temporary: Path) -> NodeProcess:
    engine, host = ENGINES[config.engine], _address(facts, config.host)
    launch = _launch(config, facts, seat, run_dir)
    own_folder = str(temporary / seat.name)
    environment = engine.environment(launch) | {"TMPDIR": own_folder, "VLLM_RPC_BASE_PATH": own_folder}
    given = config.environment_of(seat.name)
    inherited = {name: text for name, text in facts.environment.items() if engine.inherits(name)}
    if engine.is_simulated:
        inherited = _ours(facts) | inherited
    else:  # what was installed beside the engine is found: a compiler's helpers (ninja), say
        beside = Path(_engine_python(config, facts)).parent
        environment["PATH"] = f"{beside}:{facts.environment.get('PATH', _DEFAULT_PATH)}"
    if not engine.is_simulated and command.needs_plugins(launch):
        behind = given.pop("PYTHONPATH", "")
        environment["PYTHONPATH"] = f"{facts.plugins}:{behind}" if behind else str(facts.plugins)
    if config.model == TINY_MODEL:
        environment["HF_HUB_OFFLINE"] = "1"
    if config.otlp_traces_endpoint and "OTEL_SERVICE_NAME" not in facts.environment:
        environment["OTEL_SERVICE_NAME"] = seat.name
    decided = environment | given
    return NodeProcess(
        name=seat.name,
        role=seat.role,
        command=(_engine_python(config, facts), *engine.program, *engine.arguments(launch)),
        environment=decided,
        inherited={name: text for name, text in inherited.items() if name not in decided},
        ports=tuple(_ports(config, seat, host)),
        url=_url(host, seat.http_port),
        bootstrap=_url(host, seat.bootstrap_port) if seat.bootstrap_port else None,
        devices=seat.devices,
        seat=seat,
        log=run_dir / f"{seat.name}.log",
    )


def _launch(config: LaunchConfig, facts: HostFacts, seat: Seat, run_dir: Path) -> command.Launch:
    return command.Launch(
        role=seat.role,
        model=_model_argument(config, facts),
        served_names=served_names(config),
        host=_address(facts, config.host),
        port=seat.http_port,
        device=config.device,
        protocol=_protocol(config, facts)[0],
        transfer_ports=seat.transfer_ports,
        bootstrap_port=seat.bootstrap_port,
        transfer_timeout_s=config.transfer_timeout_s,
        connector=config.connector,
        store=command.Store(str(run_dir / _STORE_FILE), seat.store_client_ports) if seat.store_client_ports else None,
        max_model_len=config.max_model_len,
        devices=seat.devices,
        parallel=seat.parallel,
        rdma_devices=config.rdma_devices_of(seat.name),
        extra_args=config.arguments_of(seat.role, seat.name),
        interface="" if "GLOO_SOCKET_IFNAME" in facts.environment else facts.interface,
        no_proxy=facts.no_proxy,
        otlp_traces_endpoint=config.otlp_traces_endpoint,
    )


def _ports(config: LaunchConfig, seat: Seat, host: str) -> Iterator[Port]:
    workers = seat.parallel.workers
    yield Port(purpose="api", first=seat.http_port, last=seat.http_port, bind=host)
    if seat.bootstrap_port is not None:  # vLLM binds it on every address, whatever the node's own
        yield Port(purpose="bootstrap", first=seat.bootstrap_port, last=seat.bootstrap_port, bind=ANY)
    if drawn := transfer_ports_drawn(config, workers):
        first, last = seat.transfer_ports
        yield Port(purpose="transfer", first=first, last=last, bind=ANY, needed=drawn)  # so does the transfer engine
    if seat.store_client_ports is not None:
        first, last = seat.store_client_ports
        drawn = store_client_ports_drawn(workers)
        yield Port(purpose="store client", first=first, last=last, bind=ANY, needed=drawn)


def _services(config: LaunchConfig, facts: HostFacts, run_dir: Path, rpc: int) -> Iterator[Process]:
    if not has_store(config):
        return
    metrics, host = rpc + 1, _address(facts, config.host)
    master = Path(_engine_python(config, facts)).with_name(mooncake_store.MASTER)
    yield Process(
        name="store",
        kind="service",
        command=(str(master), *mooncake_store.master_arguments(host, rpc, metrics)),
        environment={},
        inherited=_ours(facts, *_OF_THE_STORE),
        ports=tuple(
            Port(purpose="store", first=port, last=port, bind=bind)
            for port, bind in ((rpc, host), (metrics, ANY))  # its metrics, on every address
        ),
        log=run_dir / "store.log",
    )


def _files(config: LaunchConfig, facts: HostFacts, rpc: int) -> dict[str, str]:
    if not has_store(config):
        return {}
    protocol, adapters = _protocol(config, facts)[0], config.rdma_devices_of("")
    return {_STORE_FILE: mooncake_store.store_config(_address(facts, config.host), rpc, protocol, adapters)}


def _engine_python(config: LaunchConfig, facts: HostFacts) -> str:
    if ENGINES[config.engine].is_simulated:
        return facts.our_python
    return str(config.engine_python.expanduser().absolute()) if config.engine_python else facts.engine.python


def _proxy(config: LaunchConfig, facts: HostFacts, run_dir: Path, admin: int) -> Process:
    host = _address(facts, config.proxy_host)
    words = (facts.our_python, "-P", "-m", "proxy.cli", "--topology", str(run_dir / "topology.json"))
    listening = ("--host", host, "--port", str(config.proxy_port), "--admin-port", str(admin))
    traced = ["--otlp-traces-endpoint", config.otlp_traces_endpoint] if config.otlp_traces_endpoint else []
    waiting = ("--decode-start-timeout-s", f"{config.transfer_timeout_s * _WAITS_FOR_KV:g}")
    return Process(
        name="proxy",
        kind="proxy",
        command=(*words, *listening, *waiting, *(["--any-version"] * config.any_version), *traced, *config.proxy_args),
        environment={"PYTHONUNBUFFERED": "1"},
        inherited=_ours(facts, *_OF_THE_PROXY),
        ports=(
            Port(purpose="proxy", first=config.proxy_port, last=config.proxy_port, bind=host),
            Port(purpose="admin", first=admin, last=admin, bind=admin_host(config)),
        ),
        log=run_dir / "proxy.log",
        stops_within_s=_proxy_stops_within_s(config),
    )


def _proxy_stops_within_s(config: LaunchConfig) -> float:
    """Its delay and its grace time, which are flags of its own, and a moment to end what is left by then."""
    delay = config.of_the_proxy("--shutdown-delay-s", "0")
    grace = config.of_the_proxy("--shutdown-grace-s", f"{_PROXY_GRACE_S}")
    try:
        return float(delay) + float(grace) + _PROXY_ENDS_S
    except ValueError:  # the proxy refuses it in its own words
        return _PROXY_GRACE_S + _PROXY_ENDS_S


def _ours(facts: HostFacts, *further: str) -> dict[str, str]:
    """What a program of this package, or one without a heap of settings, has of the launcher's environment."""
    beginnings = (*_OF_OUR_OWN_BEGINNINGS, *further)
    return {
        name: text
        for name, text in facts.environment.items()
        if (name in _OF_OUR_OWN or name.startswith(beginnings)) and name != "PYTHONUNBUFFERED"
    }


def _protocol(config: LaunchConfig, facts: HostFacts) -> tuple[mooncake.Protocol, str]:
    """... and why."""
    if config.connector == "none":
        return "tcp", "KV stays where it is"
    if config.transfer_protocol != "auto":
        return config.transfer_protocol, "asked for"
    if config.device == "cpu":
        return "tcp", "engines on a CPU"
    if "MC_FORCE_TCP" in facts.environment:
        return "tcp", "MC_FORCE_TCP is set"
    problem = rdma_problem(facts)
    if problem:
        return "tcp", problem
    usable = (adapter.name for adapter in facts.rdma if adapter.has_active_port and not adapter.is_efa)
    return "rdma", f"{', '.join(usable)} can be used"


def _download(config: LaunchConfig, facts: HostFacts) -> Download | None:
    """Raises nothing: what cannot be fetched here, the engine finds in its own way, or says so."""
    elsewhere = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"}
    variables = facts.environment | config.env
    is_elsewhere = any(variables.get(name, "0").lower() not in ("", "0", "false") for name in elsewhere)
    flags = command.given(tuple(chain(config.args, config.prefill_args, config.decode_args)))
    is_name = config.model != TINY_MODEL and not is_local(config, facts) and "://" not in config.model
    if ENGINES[config.engine].is_simulated or not is_name or is_elsewhere or flags.keys() & set(_NOT_FROM_THE_HUB):
        return None
    return Download(model=config.model, revision=flags.get("--revision") or None)


def _model_argument(config: LaunchConfig, facts: HostFacts) -> str:
    if ENGINES[config.engine].is_simulated:
        return config.model
    if config.model == TINY_MODEL:
        return str(facts.tiny_model)
    return str(facts.model.path or Path(config.model).expanduser()) if is_local(config, facts) else config.model


def served_names(config: LaunchConfig) -> tuple[str, ...]:
    if config.served_model_name:
        return config.served_model_name
    return (Path(config.model).name if is_local_path(config.model) else config.model,)


def is_local_path(model: str) -> bool:
    """A path, and not a name like `Qwen/Qwen3-8B` that the engine looks up."""
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..")


def is_local(config: LaunchConfig, facts: HostFacts) -> bool:
    """... or a folder that is called like one: an engine takes the folder."""
    return is_local_path(config.model) or facts.model.is_folder


def _address(facts: HostFacts, host: str) -> str:
    """A name is resolved once: nodes bind it, and tell it each other."""
    return facts.addresses.get(host) or host


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
