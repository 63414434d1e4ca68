"""vLLM's command line and environment. Checked against vLLM 0.32."""

import json
from dataclasses import dataclass
from typing import Literal

from ..base import JSONObject, Role
from ..connectors import mooncake, mooncake_store, multi
from ..connectors.names import ConnectorName

Device = Literal["cpu", "cuda"]

OWNED_FLAGS = frozenset({"--host", "--port", "--model", "--served-model-name", "--kv-transfer-config", "--uds"})
"""Flags the plan decides; passing them through would start something other than what was checked."""

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

    role: Role
    model: str
    served_model_name: str
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
    extra_args: tuple[str, ...] = ()
    no_proxy: tuple[str, ...] = ()
    """What is not to be asked through the HTTP proxy, as the user has it: a mirror of the hub, say."""


def arguments(launch: Launch) -> list[str]:
    """Everything behind `python -m vllm.entrypoints.openai.api_server`.

    That module and not `vllm serve`: the CPU build's script dies looking for a distribution named `vllm`.
    """
    config = _kv_transfer_config(launch)
    args = ["--model", launch.model, "--served-model-name", launch.served_model_name]
    args += ["--host", launch.host, "--port", str(launch.port)]
    args += ["--kv-transfer-config", json.dumps(config, separators=(",", ":"))]
    args += ["--allowed-media-domains", _NO_DOMAIN]
    args += ["--enable-prompt-tokens-details"]  # without it nobody can tell cached tokens from transferred ones
    if launch.max_model_len is not None:
        args += ["--max-model-len", str(launch.max_model_len)]
    if launch.device == "cpu":
        args += ["--enforce-eager"]  # compiling takes longer on a CPU than it ever gives back
    if _may_be_written_to_late(launch):
        args += ["--no-enable-prefix-caching"]
    if len(launch.devices) > 1:
        args += ["--tensor-parallel-size", str(len(launch.devices))]
    return args + list(launch.extra_args)


def _may_be_written_to_late(launch: Launch) -> bool:
    """Whether KV can still come in over TCP for a request whose transfer was given up.

    The sender gives up after 30 s (MC_TRANSFER_TIMEOUT), but what it has written may wait in the decode node's socket
    buffers, until Mooncake's thread comes to read them. vLLM meanwhile computes the prompt again, into the same blocks
    in another order (block_pool.py, `free_blocks`): the late KV overwrites it, and from a prefix cache it would be
    answered from for ever after. Seen on a live pair, and made at will by delaying that one thread.
    """
    pulls = launch.connector in ("MooncakeConnector", "MultiConnector")
    return launch.role is Role.DECODE and pulls and launch.protocol == "tcp"


def _kv_transfer_config(launch: Launch) -> JSONObject:
    on_cpu = launch.device == "cpu"
    if launch.connector == "MooncakeStoreConnector":
        return mooncake_store.kv_transfer_config(launch.role, on_cpu=on_cpu)
    if launch.connector == "MultiConnector":
        return multi.kv_transfer_config(launch.role, launch.protocol, on_cpu=on_cpu)
    return mooncake.kv_transfer_config(launch.role, launch.protocol, on_cpu=on_cpu)


def environment(launch: Launch) -> dict[str, str]:
    """Variables set for the node, on top of the launcher's own environment."""
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
    if launch.store is not None:
        variables |= mooncake_store.environment(launch.store.config_file, launch.store.client_ports)
    if launch.device == "cpu":
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both nodes pin their threads to the same cores
            "OMP_NUM_THREADS": "1",
        }
    if launch.devices:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(launch.devices)
    return variables


UNSET = (
    "VLLM_PORT", "MC_HANDSHAKE_PORT", "MC_LEGACY_RPC_PORT_BINDING", "VLLM_USE_V1", "VLLM_API_KEY",
    "PD_PROXY_API_KEYS", "PD_PROXY_ADMIN_KEY", "PD_NODE_API_KEY",
)  # fmt: skip
"""Taken out of a node's environment: Kubernetes sets VLLM_PORT to a URI for any service named vllm, which is a
start-up error; with VLLM_API_KEY nodes would refuse a proxy that was given no key; keys of the proxy are none of an
engine's business; and the others mislead. What `--env` sets stays."""
