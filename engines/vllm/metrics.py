"""What a vLLM node says of itself: its metrics' text and its model cards. Checked against vLLM 0.32."""

import re
from collections.abc import Mapping

from ..base import Gauges, JSONObject

KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"
PROMPT_TOKENS_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
REQUESTS_RUNNING = "vllm:num_requests_running"
REQUESTS_WAITING = "vllm:num_requests_waiting"
GENERATION_TOKENS = "vllm:generation_tokens_total"


def transferred_tokens(metrics: str) -> float:
    """Prompt tokens whose KV a decode node received from a prefill node, from its `/metrics` text."""
    return _total(metrics, PROMPT_TOKENS_BY_SOURCE, 'source="external_kv_transfer"')


def computed_tokens(metrics: str) -> float:
    """Prompt tokens a node computed itself, from its `/metrics` text."""
    return _total(metrics, PROMPT_TOKENS_BY_SOURCE, 'source="local_compute"')


def kv_cache_usage(metrics: str) -> float:
    """The share of KV cache blocks in use or held for a hand-off, 0 to 1, from a node's `/metrics` text."""
    return _total(metrics, KV_CACHE_USAGE)


def gauges(metrics: str) -> Gauges:
    """From a node's `/metrics` text. What is not there counts 0. Raises ValueError for a line that is no metric."""
    return Gauges(
        running=_total(metrics, REQUESTS_RUNNING + "{"),
        waiting=_total(metrics, REQUESTS_WAITING + "{"),
        kv_usage=kv_cache_usage(metrics),
        transferred=transferred_tokens(metrics),
        computed=computed_tokens(metrics),
        cached=_total(metrics, PROMPT_TOKENS_BY_SOURCE, 'source="local_cache_hit"'),
        generated=_total(metrics, GENERATION_TOKENS),
    )


PHASES = ("queue", "prefill", "decode")
"""Of a request in one engine. One that waits for KV is queued: it is scheduled when its KV came (scheduler.py)."""


def phases(metrics: str) -> dict[str, tuple[float, float]]:
    """(seconds, requests) spent in each of `PHASES` since the node's start, from its `/metrics` text."""
    return {phase: histogram(metrics, f"vllm:request_{phase}_time_seconds") for phase in PHASES}


def histogram(metrics: str, name: str) -> tuple[float, float]:
    """(sum, number) of what a histogram has seen, over all its labels."""
    return _total(metrics, f"{name}_sum"), _total(metrics, f"{name}_count")


def waiting_for_room(metrics: str) -> float:
    """Requests that wait for a place in the batch or for blocks, and not for KV on its way."""
    by_reason = f"{REQUESTS_WAITING}_by_reason{{"
    if by_reason in metrics:
        return _total(metrics, by_reason, 'reason="capacity"')
    return _total(metrics, REQUESTS_WAITING + "{")


CACHE_CONFIG = "vllm:cache_config_info{"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_MUST_BE_EQUAL = (
    "block_size", "cache_dtype", "kv_cache_layout", "kv_cache_dtype_skip_layers", "sliding_window", "mamba_cache_dtype",
     "mamba_ssm_cache_dtype", "mamba_page_size_padded",
)  # fmt: skip
"""vLLM compares none of it: blocks of another shape or type are read as if they were the reader's own.

`mamba_block_size` is not of these: it says how often a prefix cache keeps a state, 16 with one and the whole length
without, and only the last state moves (hybrid models, tests/models).
"""


def cache_config(metrics: str) -> dict[str, str]:
    """What a node says of its KV cache, from its `/metrics` text; empty when it does not say."""
    line = next((line for line in metrics.splitlines() if line.startswith(CACHE_CONFIG)), "")
    return dict(_LABEL.findall(line))


def cache_layout(config: Mapping[str, str]) -> dict[str, str]:
    """What must be equal on nodes between which KV moves."""
    return {name: config[name] for name in _MUST_BE_EQUAL if name in config}


def cache_tokens(config: Mapping[str, str]) -> int | None:
    """How many tokens of prompts it can keep for the next ones; None when it does not say."""
    if config.get("enable_prefix_caching") == "False":
        return 0
    blocks, size = config.get("num_gpu_blocks", ""), config.get("block_size", "")
    return int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else None


def model_cards(models: JSONObject) -> tuple[JSONObject, ...]:
    """What a node serves, LoRA adapters included, from its `GET /v1/models`. Raises ValueError if it is not that."""
    cards = models.get("data") if isinstance(models, dict) else None
    if not isinstance(cards, list) or not all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
    ):
        raise ValueError("not a list of models")
    return tuple(cards)


def _total(metrics: str, series: str, label: str = "") -> float:
    """The sum of a series over every other label (engine, model). 0 when the node has not counted yet.

    Only its own lines are read: the whole text has thousands, and is looked at every few seconds.
    """
    lines = (line for line in metrics.splitlines() if line.startswith(series) and label in line)
    try:
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
    except IndexError:
        raise ValueError(f"a line of {series} has no value") from None
