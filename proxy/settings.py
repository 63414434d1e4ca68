"""The proxy's settings: read once, at start."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.topology import Topology


class ProxySettings(BaseModel):
    """Every deadline is below the engine's own transfer timeout, which `pd-launch` sets to 60 s (vLLM: 480 s)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=64)
    """Processes that share the port and the load."""
    topology_file: Path | None = None
    topology: Topology = Topology()

    tls_certificate: Path | None = None
    tls_key: Path | None = None
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(None, ge=1, le=65535)
    """Where nodes can be added and drained at run time; nowhere unless given."""
    admin_key: str | None = None
    log_requests: Literal["failed", "all"] = "failed"
    log_format: Literal["text", "json"] = "text"

    api_keys: tuple[str, ...] = ()
    """A client must send one of these as its bearer token; none: no check."""
    node_api_key: str | None = None
    """What the nodes were started with (vLLM's `--api-key`)."""
    min_prefill_tokens: int = Field(0, ge=0)
    """Prompts estimated shorter than this are answered by a decode node alone."""
    allow_private_media: bool = False
    """Fetch media for a message from loopback and private addresses too."""
    media_timeout_s: float = Field(10, gt=0)
    max_media_bytes: int = Field(32 * 2**20, gt=0)

    connect_timeout_s: float = Field(2, gt=0)
    prefill_timeout_s: float = Field(600, gt=0)
    """Whole prefill leg. Long: a long prompt on a busy node is slow and well."""
    decode_start_timeout_s: float = Field(50, gt=0)
    """From the end of prefill to decode's first event. Below the engine's transfer timeout."""
    decode_silence_timeout_s: float = Field(120, gt=0)
    """Between two reads of a running answer."""
    whole_answer_timeout_s: float = Field(600, gt=0)
    """A decode leg that cannot be streamed (tool calls, responses): all of it."""
    request_timeout_s: float = Field(3600, gt=0)
    """A whole request, queue and retries included. A client may ask for less (`x-request-timeout`, in seconds)."""
    client_stall_timeout_s: float = Field(120, gt=0)
    """A client that takes no byte for so long loses its answer: it holds KV that others wait for."""
    resume: bool = True
    """A stream that loses its decode node in the middle goes on from another."""
    without_prefill: Literal["aggregated", "refuse"] = "aggregated"
    """When no prefill node is usable: let decode nodes compute prompts, slower, or refuse with 503."""
    max_in_flight: int = Field(4096, ge=1)
    """Requests inside at once, in each worker process."""
    max_queue: int = Field(1024, ge=0)
    """Requests waiting for a place, in each worker process; more are told to come back later (429)."""
    queue_timeout_s: float = Field(30, gt=0)
    max_node_in_flight: int = Field(2048, ge=1)
    """Requests on one decode node, all workers together."""
    max_node_waiting: int = Field(64, ge=0)
    """A decode node with more requests than this in its own queue gets no more for now."""
    max_node_kv_usage: float = Field(0.98, gt=0, le=1)
    """... nor does one whose KV cache is this full."""
    probe_interval_s: float = Field(2, gt=0)
    probe_timeout_s: float = Field(2, gt=0)
    head_timeout_s: float = Field(10, gt=0)
    """For a request's head to come, from its first byte or from the connection's beginning."""
    body_timeout_s: float = Field(30, gt=0)
    """Between two pieces of a request's body."""
    max_body_bytes: int = Field(64 * 2**20, gt=0)
    shutdown_delay_s: float = Field(0, ge=0)
    """From SIGTERM, which /health tells at once (503), to the end of accepting: for a load balancer to notice."""
    shutdown_grace_s: float = Field(30, ge=0)

    @model_validator(mode="after")
    def _nodes_come_from_one_place(self) -> Self:
        if self.topology_file is not None and self.topology.nodes:
            raise ValueError("nodes come from the topology file or from flags, not from both")
        return self

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both, --tls-certificate and --tls-key")
        if self.admin_port is not None and not self.admin_key:
            raise ValueError("an admin port needs a key: set PD_PROXY_ADMIN_KEY")
        if self.admin_key and self.admin_key in self.api_keys:
            raise ValueError("the admin key is one of the clients' keys; it must be another")
        return self
