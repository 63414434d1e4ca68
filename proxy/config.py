"""The proxy's settings: read once, at start."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.topology import Topology


class ProxySettings(BaseModel):
    """Every deadline is below the engine's own transfer timeout, which `pd-launch` sets to 60 s (vLLM: 480 s)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    topology_file: Path | None = None
    topology: Topology = Topology()

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
    probe_interval_s: float = Field(2, gt=0)
    probe_timeout_s: float = Field(2, gt=0)
    max_body_bytes: int = Field(64 * 2**20, gt=0)
    shutdown_grace_s: float = Field(30, ge=0)

    @model_validator(mode="after")
    def _nodes_come_from_one_place(self) -> Self:
        if self.topology_file is not None and self.topology.nodes:
            raise ValueError("nodes come from the topology file or from flags, not from both")
        return self
