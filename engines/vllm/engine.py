"""vLLM behind the words of `Engine`: what the proxy asks of a node's software, by its version."""

from functools import lru_cache

import orjson
from packaging.version import InvalidVersion, Version

from ..base import JSONObject, NodeFacts, Prefilled
from ..openai.request import Asked
from ..openai.routes import Route
from . import bodies, metrics

_SURVIVES_REFUSALS = Version("0.32")
"""Before, a refused request that carries a hand-off ends the decode node's engine (`assert req_id in self.requests`,
v1/core/sched/scheduler.py; seen on live pairs of 0.29, 0.30 and 0.31)."""


class VLLM:
    """One engine, all versions of it. Implements `engines.base.Engine`."""

    name = "vLLM"
    health_path = "/health"
    models_path = "/v1/models"
    metrics_path = "/metrics"
    version_path = "/version"

    def facts(self, models: bytes, metrics_text: bytes, version: bytes) -> NodeFacts:
        """From the answers of the paths above. Raises ValueError when they are not those of this engine."""
        try:
            cards = metrics.model_cards(orjson.loads(models))
            gauges = metrics.gauges(metrics_text.decode("utf-8", "replace"))
            found = orjson.loads(version)
        except (TypeError, KeyError, AttributeError, IndexError) as exc:
            raise ValueError("not the answers of a vLLM server") from exc
        said = found.get("version") if isinstance(found, dict) else None
        return NodeFacts(cards, gauges, said if isinstance(said, str) else "")

    def prefill_leg(self, route: Route, asked: Asked, transfer_params: JSONObject | None) -> JSONObject:
        return bodies.prefill_body(route, asked, transfer_params)

    def prefilled(self, route: Route, raw: bytes) -> Prefilled:
        """Raises PrefillRefusedError."""
        return bodies.prefilled(route, raw)

    def decode_leg(
        self, route: Route, asked: Asked, transfer_params: JSONObject | None, prefilled: Prefilled, *, stream: bool
    ) -> JSONObject:
        return bodies.decode_body(route, asked, transfer_params, prefilled, stream=stream)

    def tell_tokens(self, leg: JSONObject) -> None:
        """Have a decode leg's stream tell its tokens, for a continuation."""
        leg["return_token_ids"] = True

    def release_leg(self, model: object, transfer_params: JSONObject) -> JSONObject:
        return bodies.release_body(model, transfer_params)

    def is_freed_by_refusal(self, status: int, error_kind: str) -> bool:
        return bodies.is_released_by_refusal(status, error_kind)

    def survives_refusals(self, version: str) -> bool:
        return _survives_refusals(version)


@lru_cache(maxsize=64)
def _survives_refusals(version: str) -> bool:
    try:
        return Version(version) >= _SURVIVES_REFUSALS
    except InvalidVersion:
        return True  # a build of one's own; those are new
