"""What this machine is like: the one place that looks, for plans and checks that are pure."""

import json
import os
import pwd
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs
import psutil

import engines.plugins
from engines.known import ENGINES
from engines.vllm.command import inherits

from ...errors import PreflightError
from ...plan.config import TINY_MODEL, LaunchConfig
from ...plan.facts import APPLICATION, EngineFacts, HostFacts, ModelFacts
from ...plan.planner import is_local_path
from ...plan.seats import Port, ranges_of
from ...setup import environments
from . import gpus, rdma
from .locks import locked_gpus
from .ports import taken

_LONGEST_TEMPORARY = 30
_MIB = 2**20
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  not ours to name
_CGROUP = Path("/sys/fs/cgroup")
_KERNEL = Path("/proc/sys/net/ipv4")
_SELF = Path("/proc/self")
_EPHEMERAL_PORTS = (32768, 60999)
_CAP_IPC_LOCK = 1 << 14
_PROXY_SAYS_WITHIN_S = 60
_CHILDREN_RUN_IN = "/"
_LOOKED_AT = (
    "PATH", "HOME", "LANG", "TZ", "USER", "LOGNAME", "TMPDIR", "NO_COLOR", "no_proxy", "NO_PROXY", "VLLM_USE_V1",
    "VLLM_API_KEY", "MC_FORCE_TCP", "VLLM_PORT",
)  # fmt: skip
_MODEL_CONFIGS = ("config.json", "params.json")
"""... the second is Mistral's."""
_KEYS, _KEYS_FILE = "PD_PROXY_API_KEYS", "--api-keys-file"
_OF_THE_PROXY = ("PD_PROXY_", "PD_NODE_")
_LOOKED_AT_BEGINNINGS = (
    "PYTHON",
    "LC_",
    "LD_",
    "SSL_",
    "OTEL_",
    "COVERAGE_",
    "XDG_",
    "SLURM_",
    *_OF_THE_PROXY,
)


def gather(config: LaunchConfig, further: Sequence[Port] = (), *, engine: bool = True) -> HostFacts:
    """Of this machine, now. `further`: ports to look at beside those of the configuration's ranges.

    `engine`: look into the engine's environment too, which takes a second. Raises nothing: what cannot be found out,
    or is wrong, is a fact.
    """
    addresses = {host: _resolved(host) for host in {config.host, config.proxy_host} if not _is_address(host)}
    busy, unusable = taken((*ranges_of(config, addresses), *further))
    found = gpus.find() if config.device == "cuda" else gpus.Found(problem="--device is cpu")
    run_dir = _new_run_dir() if config.run_dir is None else config.run_dir.expanduser().absolute()
    problem, free = _folder(run_dir)
    return HostFacts(
        name=socket.gethostname(),
        resolves_to=_resolved(socket.gethostname()) or None,
        addresses=addresses,
        interface=_interface(addresses.get(config.host) or config.host),
        unusable=unusable,
        memory_available_mib=_memory_available() // _MIB,
        shared_memory_free_mib=_free(Path(_SHARED_MEMORY)) // _MIB,
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory_kib=_locked_memory_kib(),
        run_dir_problem=problem,
        run_dir_free_mib=free // _MIB,
        ephemeral_ports=_ephemeral_ports(),
        reserved_ports=_reserved_ports(),
        taken=busy,
        gpus=found.gpus,
        gpu_problem=found.problem,
        driver=found.driver,
        locked_gpus=locked_gpus(),
        rdma=rdma.adapters(),
        has_uverbs=rdma.has_uverbs(),
        environment=_environment(config),
        our_python=sys.executable,
        engine=_engine(config, look=engine),
        relative_paths=tuple(_relative_paths(config)),
        proxy_problem=_proxy_problem(config) if engine else "",
        model=_model(config),
        tiny_model=environments.tiny_model_path(),
        plugins=Path(engines.plugins.__path__[0]),
        new_run_dir=run_dir,
        temporary=_short_temporary(),
    )


def _environment(config: LaunchConfig) -> dict[str, str]:
    """What children may inherit, and what is looked at. Who has no name here gets one: torch asks for it. Where the
    clients' keys are in a file, the proxy gets one more: the run's own first request needs one.
    """
    own = {
        name: text
        for name, text in os.environ.items()
        if inherits(name) or name in _LOOKED_AT or name.startswith(_LOOKED_AT_BEGINNINGS)
    }
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # a container that runs as a number
        own = {"USER": APPLICATION, "LOGNAME": APPLICATION} | own
    if any(word.startswith(_KEYS_FILE) for word in config.proxy_args):
        own.setdefault(_KEYS, secrets.token_hex())
    return own


def _engine(config: LaunchConfig, *, look: bool) -> EngineFacts:
    if ENGINES[config.engine].is_simulated:
        return EngineFacts(python=sys.executable)
    python = config.engine_python.expanduser().absolute() if config.engine_python else None
    python = python or environments.python_of(config.device)
    master = os.path.exists(python.with_name("mooncake_master"))  # noqa: PTH110  raises nothing
    if not look:
        return EngineFacts(python=str(python), has_store_master=master)
    try:
        versions = environments.quick_versions(python)
    except PreflightError as exc:
        return EngineFacts(python=str(python), has_store_master=master, problem=str(exc), remedy=exc.hint)
    return EngineFacts(python=str(python), has_store_master=master, versions=versions)


def _proxy_problem(config: LaunchConfig) -> str:
    """What the proxy itself says of the flags and variables it is given."""
    given = [*config.proxy_args]
    if config.otlp_traces_endpoint:
        given += ["--otlp-traces-endpoint", config.otlp_traces_endpoint]
    if not given and not any(name.startswith(_OF_THE_PROXY) for name in os.environ):
        return ""
    command = [sys.executable, "-P", "-m", "proxy.cli", "--topology", os.devnull, "--check", *given]
    command += ["--admin-port", str(config.admin_ports.first)]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL,
            cwd=_CHILDREN_RUN_IN, timeout=_PROXY_SAYS_WITHIN_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as exc:
        return f"`pd-proxy --check` did not answer: {exc}"
    lines = [line.strip(" │") for line in said.stderr.splitlines() if line.strip(" │╭╮╰╯─")]
    return (lines or [f"exit code {said.returncode}"])[-1].removeprefix("pd-proxy: ") if said.returncode else ""


def _model(config: LaunchConfig) -> ModelFacts:
    """A folder that is called like a model of the hub (`models/mine`) is one too: an engine would take it."""
    path = Path(os.path.expanduser(config.model)).absolute()  # noqa: PTH111  raises nothing where nobody has a home
    if config.model == TINY_MODEL or not (is_local_path(config.model) or os.path.isdir(path)):  # noqa: PTH112  as above
        return ModelFacts()
    try:
        settings = json.loads((path / "config.json").read_text())
        settings = settings.get("text_config") or settings
        heads, kv_heads = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    except (OSError, ValueError, AttributeError):
        heads = kv_heads = None
    return ModelFacts(
        path=path,
        exists=os.path.exists(path),  # noqa: PTH110  a folder that may not be entered raises nothing
        is_folder=os.path.isdir(path),  # noqa: PTH112
        has_config=any(os.path.exists(path / name) for name in _MODEL_CONFIGS),  # noqa: PTH110
        attention_heads=heads if isinstance(heads, int) else None,
        kv_heads=kv_heads if isinstance(kv_heads, int) else None,
    )


def _relative_paths(config: LaunchConfig) -> Iterator[str]:
    """What is there, seen from here, and would be looked for elsewhere by a child."""
    flags = (*config.args, *config.prefill_args, *config.decode_args, *config.node_args, *config.proxy_args)
    variables = (*config.env.values(), *(pair.split("=", 2)[-1] for pair in config.node_env))
    for word in (*flags, *variables):
        path = word.rpartition("=")[2]
        if ("/" in path or "." in path.strip(".")) and not path.startswith(("/", "~")) and os.path.exists(path):  # noqa: PTH110
            yield path


def _new_run_dir() -> Path:
    return platformdirs.user_state_path(APPLICATION) / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _folder(folder: Path) -> tuple[str, int]:
    """(why logs cannot be written there, free bytes); nothing is made there."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):  # noqa: PTH112  raises nothing
        return f"{there} is no folder", 0
    try:
        disk, mine = shutil.disk_usage(there), there.stat()
    except OSError as exc:
        return exc.strerror or type(exc).__name__, 0
    free = disk.free
    if not disk.total:
        return f"{there} keeps no files", 0
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to", free
    if there == folder and mine.st_uid not in (os.getuid(), 0):
        return f"it belongs to user {mine.st_uid}, who could put links in the place of logs", free
    return "", free


def _memory_available() -> int:
    """What the machine has, or what the limit of a container (cgroup 1 or 2) leaves."""
    left = psutil.virtual_memory().available
    for limit, used in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current"),
        (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            left = min(left, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # not this kind, or "max"
            continue
    return max(0, left)


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _limit(kind: int) -> int | None:
    """What children have: a node raises its limits as far as it may."""
    _, hard = resource.getrlimit(kind)
    return None if hard == resource.RLIM_INFINITY else hard


def _locked_memory_kib() -> int | None:
    kept = _limit(resource.RLIMIT_MEMLOCK)
    return None if kept is None or _may_lock_all() else kept // 1024


def _may_lock_all() -> bool:
    """CAP_IPC_LOCK, which counts in the first user namespace only (the driver asks there)."""
    try:
        status = (_SELF / "status").read_text()
        is_first = (_SELF / "uid_map").read_text().split() == ["0", "0", "4294967295"]
        effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
        return is_first and bool(int(effective, 16) & _CAP_IPC_LOCK)
    except (OSError, ValueError, StopIteration):
        return False


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return host in ("", "*")


def _resolved(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError):  # a label that is empty or too long
        return ""


def _interface(address: str) -> str:
    found = (name for name, known in psutil.net_if_addrs().items() if any(one.address == address for one in known))
    return next(found, "")


def _ephemeral_ports() -> tuple[int, int]:
    try:
        first, last = (_KERNEL / "ip_local_port_range").read_text().split()
        return int(first), int(last)
    except (OSError, ValueError):  # a sandbox with a /proc of its own
        return _EPHEMERAL_PORTS


def _reserved_ports() -> tuple[tuple[int, int], ...]:
    try:
        text = (_KERNEL / "ip_local_reserved_ports").read_text().strip()
        ends = [part.partition("-") for part in text.split(",") if part]
        return tuple((int(first), int(last or first)) for first, _, last in ends)
    except (OSError, ValueError):
        return ()


def _short_temporary() -> Path:
    """A Unix socket's path has at most 107 bytes, and engines add about 65 to this one."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= _LONGEST_TEMPORARY else Path("/tmp")  # noqa: S108  a private folder is made there
