"""vLLM's command line and environment. Checked against vLLM 0.32."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..base import JSONObject, NodeRole, Parallel, Role
from ..connectors import mooncake, mooncake_store, multi
from ..connectors.names import ConnectorName

Device = Literal["cpu", "cuda"]

_OVER_HTTP = "pd-launch asks its nodes over HTTP at the addresses of its plan"
_ONE_HOST = "a node of pd-launch lies on one host"
OWNED_FLAGS = {
    "--model": "use --model of pd-launch",
    "--served-model-name": "use --served-model-name of pd-launch",
    "--host": "use --host of pd-launch",
    "--port": "use --http-ports",
    "--kv-transfer-config": "use --connector, --transfer-protocol and --rdma-devices",
    "--tensor-parallel-size": "use --tensor-parallel",
    "--pipeline-parallel-size": "use --pipeline-parallel",
    "--data-parallel-size": "use --data-parallel",
    "--device-ids": "use --devices",
    "--config": "give its flags one by one: it may hold what pd-launch decides",
    "--uds": _OVER_HTTP,
    "--ssl-keyfile": _OVER_HTTP,
    "--ssl-certfile": _OVER_HTTP,
    "--ssl-ca-certs": _OVER_HTTP,
    "--ssl-cert-reqs": _OVER_HTTP,
    "--root-path": _OVER_HTTP,
    "--headless": _ONE_HOST,
    "--nnodes": _ONE_HOST,
    "--node-rank": _ONE_HOST,
    "--master-addr": _ONE_HOST,
    "--data-parallel-size-local": _ONE_HOST,
    "--data-parallel-rank": _ONE_HOST,
    "--data-parallel-start-rank": _ONE_HOST,
    "--data-parallel-address": _ONE_HOST,
    "--data-parallel-hybrid-lb": _ONE_HOST,
    "--data-parallel-external-lb": _ONE_HOST,
    "--otlp-traces-endpoint": "use pd-launch's own --otlp-traces-endpoint",
    "--disable-log-stats": "without its counters nobody can tell whether KV moves",
}
"""Flags the plan decides, and what to do instead: with another value something else would run than was checked."""

_SHORTEST_ABBREVIATION = 5
_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpe": "--data-parallel-external-lb",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-q": "--quantization",
    "-sc": "--speculative-config",
}
"""VLLM's own short names of some flags."""

UNSET = frozenset(
    {"VLLM_PORT", "MC_HANDSHAKE_PORT", "MC_LEGACY_RPC_PORT_BINDING", "VLLM_USE_V1", "VLLM_API_KEY", "MC_FORCE_TCP"}
)
"""Never inherited: Kubernetes sets VLLM_PORT to a URI for any service named vllm, which is a start-up error; with
VLLM_API_KEY nodes would refuse a proxy that was given no key; the others mislead. `--env` can still set them."""


def flag_name(word: str) -> str:
    """The flag in a word of a command line, as vLLM's parser reads it: `--a_b=1` and `--a-b.c` are `--a-b`."""
    if not word.startswith("-"):
        return ""
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")
    return _SHORT.get(name, name)


def owned(words: Sequence[str]) -> dict[str, str]:
    """The flags among these that the plan decides -> what to do instead. Abbreviations count: the parser knows them."""
    found = {}
    for word in words:
        name = flag_name(word)
        meant = [flag for flag in OWNED_FLAGS if flag == name]
        if not meant and len(name) >= _SHORTEST_ABBREVIATION:
            meant = [flag for flag in OWNED_FLAGS if flag.startswith(name)]
        if meant:
            found[word.partition("=")[0]] = OWNED_FLAGS[meant[0]]
    return found


def given(words: Sequence[str]) -> dict[str, str]:
    """Flag -> value of a command line, by the flags' names; "" for one that has none. The last of equal ones counts."""
    found: dict[str, str] = {}
    before = ""
    for word in words:
        name = flag_name(word)
        if not name:
            if before:
                found[before] = word
            before = ""
            continue
        _, equals, value = word.partition("=")
        found[name] = value
        before = "" if equals else name
    return found


_INHERITED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TERM", "TZ", "HOSTNAME", "LD_LIBRARY_PATH",
        "LD_PRELOAD", "LIBRARY_PATH", "CPATH", "CC", "CXX", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_COLOR",
        "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "MAX_JOBS", "WITH_NVIDIA_PEERMEM", "DO_NOT_TRACK",
        "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "TOKENIZERS_PARALLELISM",
    }
)  # fmt: skip
_INHERITED_BEGINNINGS = (
    "LC_", "XDG_", "SSL_", "CUDA_", "NVIDIA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVSHMEM_", "GLOO_", "UCX_", "IBV_",
    "RDMA", "MLX5_", "FI_", "MC_", "MOONCAKE_", "VLLM_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "MODELSCOPE_",
    "TRANSFORMERS_", "SAFETENSORS_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "FLASHINFER_", "DG_", "NVCC_",
    "OMP_", "MKL_", "KMP_", "GOMP_", "NUMBA_",
    "RAYON_", "AWS_", "S3_", "GOOGLE_", "AZURE_", "TIKTOKEN_", "OTEL_", "GLOG_", "RUNAI_", "SLURM_",
)  # fmt: skip


def inherits(name: str) -> bool:
    """Whether a variable of the launcher's own environment reaches an engine. Nothing else does by accident: neither
    what a shell has set up for other programs, nor the keys of the proxy. `--env NAME` passes further ones on.
    """
    return name not in UNSET and (name in _INHERITED or name.startswith(_INHERITED_BEGINNINGS))


_NO_DOMAIN = "none.invalid"
"""The one media may be fetched from, and it can never exist (RFC 2606): the proxy fetches media, and checks from where.
A node that dials what a client names is a way into its network (CVE-2025-6242)."""


@dataclass(frozen=True, slots=True)
class Store:
    """What a node is told about the shared KV store."""

    config_file: str
    client_ports: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Launch:
    """What one node is started with; the plan fills it in."""

    role: NodeRole
    model: str
    served_names: tuple[str, ...]
    """What clients may call it; the first is the one that answers name."""
    host: str
    port: int
    device: Device
    protocol: mooncake.Protocol
    transfer_ports: tuple[int, int]
    bootstrap_port: int | None
    transfer_timeout_s: int
    connector: ConnectorName = "MooncakeConnector"
    store: Store | None = None
    """Where the shared store is, for the connectors that have one."""
    max_model_len: int | None = None
    devices: tuple[str, ...] = ()
    parallel: Parallel = field(default_factory=Parallel)
    rdma_devices: tuple[str, ...] = ()
    """The adapters KV may move over; none: Mooncake's own choice."""
    extra_args: tuple[str, ...] = ()
    interface: str = ""
    """The network interface that has `host`; empty when nobody knows, or the user has chosen."""
    otlp_traces_endpoint: str | None = None
    no_proxy: tuple[str, ...] = ()
    """What is not to be asked through the HTTP proxy, as the user has it: a mirror of the hub, say."""


def arguments(launch: Launch) -> list[str]:
    """Everything behind `python -m vllm.entrypoints.openai.api_server`.

    That module and not `vllm serve`: the CPU build's script dies looking for a distribution named `vllm`.
    """
    args = ["--model", launch.model, "--served-model-name", *launch.served_names]
    args += ["--host", launch.host, "--port", str(launch.port)]
    if launch.connector != "none":
        args += ["--kv-transfer-config", json.dumps(_kv_transfer_config(launch), separators=(",", ":"))]
    args += ["--allowed-media-domains", _NO_DOMAIN]
    args += ["--enable-prompt-tokens-details"]  # without it nobody can tell cached tokens from transferred ones
    if launch.max_model_len is not None:
        args += ["--max-model-len", str(launch.max_model_len)]
    if launch.otlp_traces_endpoint is not None:
        args += ["--otlp-traces-endpoint", launch.otlp_traces_endpoint]
    if launch.device == "cpu":
        args += ["--enforce-eager"]  # compiling takes longer on a CPU than it ever gives back
    if _may_be_written_to_late(launch):
        args += ["--no-enable-prefix-caching"]
    for flag, size in launch.parallel.flags().items():
        args += [flag, str(size)]
    return args + list(launch.extra_args)


def _may_be_written_to_late(launch: Launch) -> bool:
    """Whether KV can still come in over TCP for a request whose transfer was given up.

    The sender gives up after 30 s (MC_TRANSFER_TIMEOUT), but what it has written may wait in the decode node's socket
    buffers, until Mooncake's thread comes to read them. vLLM meanwhile computes the prompt again, into the same blocks
    in another order (block_pool.py, `free_blocks`): the late KV overwrites it, and from a prefix cache it would be
    answered from for ever after. Seen on a live pair, and made at will by delaying that one thread.
    """
    pulls = launch.connector in ("MooncakeConnector", "MultiConnector")
    return launch.role.does(Role.DECODE) and pulls and launch.protocol == "tcp"


def _kv_transfer_config(launch: Launch) -> JSONObject:
    on_cpu = launch.device == "cpu"
    if launch.connector == "MooncakeStoreConnector":
        return mooncake_store.kv_transfer_config(launch.role, on_cpu=on_cpu)
    if launch.connector == "MultiConnector":
        return multi.kv_transfer_config(launch.role, launch.protocol, launch.rdma_devices, on_cpu=on_cpu)
    return mooncake.kv_transfer_config(launch.role, launch.protocol, launch.rdma_devices, on_cpu=on_cpu)


def environment(launch: Launch) -> dict[str, str]:
    """Variables set for the node, on top of those it inherits."""
    variables = {}
    if launch.connector != "none":
        variables = mooncake.environment(
            transfer_ports=launch.transfer_ports,
            bootstrap_port=launch.bootstrap_port,
            protocol=launch.protocol,
            transfer_timeout_s=launch.transfer_timeout_s,
        )
    variables |= {
        "VLLM_HOST_IP": launch.host,  # else guessed, and a wrong network card is a transfer that times out
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",  # the default, 5 s, drops the proxy's idle connections
        "VLLM_NO_USAGE_STATS": "1",
        "NO_PROXY": ",".join((launch.host, "127.0.0.1", "localhost", *launch.no_proxy)),  # bootstrap is plain HTTP
        "no_proxy": ",".join((launch.host, "127.0.0.1", "localhost", *launch.no_proxy)),
        "PYTHONUNBUFFERED": "1",
    }
    if launch.interface:
        variables["GLOO_SOCKET_IFNAME"] = launch.interface  # else it takes what the host's own name resolves to
    if launch.store is not None:
        variables |= mooncake_store.environment(launch.store.config_file, launch.store.client_ports)
    if launch.device == "cpu":
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both nodes pin their threads to the same cores
            "OMP_NUM_THREADS": "1",
        }
    if launch.devices:  # numbers are NVML's, which go by the PCI bus; CUDA's own go by speed unless told
        variables |= {"CUDA_VISIBLE_DEVICES": ",".join(launch.devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return variables


def needs_plugins(launch: Launch) -> bool:
    """Whether the node loads a module of ours, by a name in its KV transfer configuration."""
    return launch.connector != "none" and (launch.device == "cpu" or launch.connector == "MultiConnector")
