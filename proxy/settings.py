"""The proxy's settings: read once, at start, from flags, a file and the environment. The flags are made from this."""

import ipaddress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engines.topology import Topology

MIB = 2**20


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Listed = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Written with commas."""


def is_loopback(host: str) -> bool:
    """A name or an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_http_url(text: str) -> bool:
    """With a host, and a port that is one if there is any."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


class ProxySettings(BaseModel):
    """Every deadline is below the engine's own transfer timeout, which `pd-launch` sets to 60 s (vLLM: 480 s).

    A field's description is its flag's help, and its line in the README.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- nodes
    topology_file: Path | None = Field(None, description="Take the nodes from this file, and follow its changes.")
    topology: Topology = Topology()
    """Nodes given by flags."""

    # -- listening
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=64, description="Processes that share the port and the load.")
    tls_certificate: Path | None = Field(None, description="Serve HTTPS (PEM); followed while it changes.")
    tls_key: Path | None = Field(None, description="The certificate's key (PEM).")
    keep_alive_s: float = Field(75, gt=0, description="How long a client's idle connection stays open.")
    head_timeout_s: float = Field(10, gt=0, description="For a request's head to come, from its first byte.")
    body_timeout_s: float = Field(30, gt=0, description="Between two pieces of a request's body.")
    client_stall_timeout_s: float = Field(
        120, gt=0, description="A client that takes no byte of its answer for so long loses it."
    )
    max_connections: int = Field(16384, ge=1, description="Clients' connections at once, in each worker.")
    shutdown_delay_s: float = Field(
        0, ge=0, description="After SIGTERM, serve so long with /health at 503, for a load balancer to notice."
    )
    shutdown_grace_s: float = Field(30, ge=0, description="How long running answers may go on after SIGTERM.")

    # -- who may ask
    api_keys_file: Path | None = Field(
        None, description="Clients' keys, one a line as `[NAME] KEY`, '#' begins a comment; followed while it changes."
    )
    api_keys: tuple[str, ...] = ()
    """From the environment (PD_PROXY_API_KEYS)."""
    node_api_key: str | None = None
    """From the environment (PD_NODE_API_KEY): what the nodes were started with (vLLM's `--api-key`)."""
    admin_host: str = Field("127.0.0.1", description="Address of the admin listener.")
    admin_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="See nodes and requests on a page, and add, drain and remove nodes, here (PD_PROXY_ADMIN_KEY).",
    )
    admin_key: str | None = None
    """From the environment (PD_PROXY_ADMIN_KEY)."""

    allowed_origins: Listed = Field(
        (), description="Origins of web pages that may ask (CORS): https://a.example,https://b.example, or *."
    )
    allowed_methods: Listed = Field(("*",), description="... and the methods they may use.")
    allowed_headers: Listed = Field(("*",), description="... and the headers they may send.")
    allow_credentials: bool = Field(default=False, description="... and whether with cookies.")

    any_version: bool = Field(
        default=False, description="Use nodes of versions that were not tried, too (`/health` names them else)."
    )

    canary_interval_s: float = Field(
        300,
        ge=0,
        description="Compare so often what each pair answers with what its decode node says alone, and once a node has "
        "started; 0: never.",
    )

    # -- which way a request takes
    min_prefill_tokens: int = Field(
        0, ge=0, description="Answer prompts shorter than about this by a decode node alone."
    )
    split: Literal["always", "when-faster"] = Field(
        "always",
        description="Hand every prompt over; or let a decode node alone answer what it has its first token of sooner, "
        "as measured here.",
    )
    prefill_policy: Literal["prefix-cost", "least-load", "round-robin"] = Field(
        "prefix-cost",
        description="Which prefill node computes a prompt: the one that is through with it first, what it has cached "
        "of it and its queue considered; the one with the fewest requests; or the next.",
    )
    ttft_target_s: float = Field(
        2, gt=0, description="Nodes that do both turn to prefill when a new prompt would wait longer than this,"
    )
    tpot_target_s: float = Field(0.1, gt=0, description="... and to decode when a token takes longer than this.")
    without_prefill: Literal["aggregated", "refuse"] = Field(
        "aggregated",
        description="When no prefill node is usable: let decode nodes compute prompts too, or refuse (503).",
    )
    resume: bool = Field(
        default=True, description="Go on with a stream that loses its decode node in the middle, from another."
    )

    # -- deadlines
    request_timeout_s: float = Field(
        3600, gt=0, description="For a whole request; clients may ask for less (x-request-timeout)."
    )
    prefill_timeout_s: float = Field(600, gt=0, description="For a whole prefill leg.")
    decode_start_timeout_s: float = Field(
        50, gt=0, description="From the hand-off to decode's first event; below the engines' transfer timeout."
    )
    decode_silence_timeout_s: float = Field(120, gt=0, description="Between two chunks of a running answer.")
    whole_answer_timeout_s: float = Field(
        600, gt=0, description="For an answer that no node streams: tool calls, responses, what one node does alone."
    )
    connect_timeout_s: float = Field(2, gt=0, description="For a connection to a node.")
    probe_interval_s: float = Field(2, gt=0, description="Between two probes of a node.")
    probe_timeout_s: float = Field(2, gt=0, description="For each answer to a probe.")

    sse_keep_alive_s: float = Field(
        0, ge=0, description="Send a comment so often into a stream whose prompt is still computed; 0: never."
    )

    # -- limits
    max_in_flight: int = Field(4096, ge=1, description="Requests inside at once, in each worker.")
    max_queue: int = Field(1024, ge=0, description="Requests that may wait for a place; more get a 429.")
    queue_timeout_s: float = Field(30, gt=0, description="How long one may wait.")
    max_node_in_flight: int = Field(2048, ge=1, description="Requests on one decode node, all workers together.")
    max_node_waiting: int = Field(
        64, ge=0, description="A decode node with more requests than this in its own queue gets no more for now."
    )
    max_node_kv_usage: float = Field(0.98, gt=0, le=1, description="... nor does one whose KV cache is this full.")
    max_body_bytes: int = Field(64 * MIB, gt=0, description="Of one request's body.")
    max_request_memory_bytes: int = Field(
        512 * MIB, gt=0, description="Of all bodies and fetched media at once, in each worker; more get a 429."
    )
    max_media_bytes: int = Field(32 * MIB, gt=0, description="Of all media fetched for one request.")
    max_media_count: int = Field(32, ge=1, description="Media fetched for one request.")
    media_timeout_s: float = Field(10, gt=0, description="For all media of one request.")
    allow_private_media: bool = Field(default=False, description="Fetch media for messages from private addresses too.")

    # -- telling
    log_requests: bool = Field(
        default=False, description="One log line for every request, not only for those that failed."
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        description="Send traces to this OpenTelemetry collector, as the OTEL_* variables say (gRPC unless they do): "
        "http://HOST:4317 (needs pd-launch[otel]).",
    )
    log_format: Literal["text", "json"] = Field("text", description="Of log lines.")

    @model_validator(mode="after")
    def _nodes_come_from_one_place(self) -> Self:
        if self.topology_file is not None and self.topology.nodes:
            raise ValueError("nodes come from --topology or from --prefill and --decode, not from both")
        return self

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both, --tls-certificate and --tls-key")
        if self.split != "always" and self.without_prefill == "refuse":
            raise ValueError("--split when-faster lets decode nodes compute prompts, --without-prefill refuse does not")
        if self.admin_port is not None and not self.admin_key and not is_loopback(self.admin_host):
            raise ValueError("an admin port that others reach needs a key: set PD_PROXY_ADMIN_KEY")
        if self.admin_key and self.admin_key in self.api_keys:
            raise ValueError("the admin key is one of the clients' keys; it must be another")
        return self

    @model_validator(mode="after")
    def _traces_can_be_sent(self) -> Self:
        if self.otlp_traces_endpoint is None:
            return self
        if not is_http_url(self.otlp_traces_endpoint):
            raise ValueError(f"--otlp-traces-endpoint {self.otlp_traces_endpoint!r} is no URL like http://HOST:4317")
        if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
            raise ValueError("--otlp-traces-endpoint needs OpenTelemetry's SDK: pip install 'pd-launch[otel]'")
        return self

    @property
    def needs_key(self) -> bool:
        """Clients must send a key."""
        return bool(self.api_keys) or self.api_keys_file is not None
