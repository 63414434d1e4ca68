"""What a vLLM node says of itself: its metrics' text and its model cards. Checked against vLLM 0.32."""

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
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
