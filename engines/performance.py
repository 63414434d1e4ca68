"""How long an engine takes, in seconds and tokens: measured by the launcher, played by the proxy's simulation."""

from pydantic import BaseModel, ConfigDict, Field


class Constants(BaseModel):
    """Of one node of a kind of device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill: tuple[float, float, float]
    """(a, b, c): a prompt takes a + b * uncached tokens + c * (its tokens² - cached tokens²)."""
    decode: tuple[float, float, float]
    """(a, b, c): a step takes a + b * sequences + c * tokens of their KV."""
    hand_off: tuple[float, float]
    """(a, b): KV takes a + b * tokens to the decode node."""
    rest_s: float = Field(0.0, ge=0)
    """Of a request in proxy and servers, before its first token."""
    kv_tokens: int = Field(ge=1)
    """That a node has room for."""
    sequences: int = Field(256, ge=1)
    """That a node decodes at once at most (max_num_seqs)."""
    step_tokens: int = Field(2048, ge=1)
    """Of prompts, in one step at most (max_num_batched_tokens)."""

    def prefill_s(self, tokens: float, cached: float) -> float:
        a, b, c = self.prefill
        return max(a + b * (tokens - cached) + c * (tokens**2 - cached**2), 1e-6)

    def step_s(self, sequences: float, live_tokens: float) -> float:
        a, b, c = self.decode
        return max(a + b * sequences + c * live_tokens, 1e-6)

    def hand_off_s(self, tokens: float) -> float:
        a, b = self.hand_off
        return max(a + b * tokens, 0.0)
