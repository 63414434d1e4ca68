"""vLLM behind the words of `Engine`: what the proxy asks of a node's software, by its version."""

import orjson

from ..base import Connector, JSONObject, NodeFacts, Prefilled
from ..connectors.mooncake import PORTS_PER_TRANSFER_ENGINE
from ..openai.request import Asked
from ..openai.routes import Route
from . import bodies, command, metrics, versions


class VLLM:
    """One engine, all versions of it. Implements `engines.base.Engine`, and what the launcher starts a node by."""

    name = "vLLM"
    is_simulated = False
    program: tuple[str, ...] = ("-m", "vllm.entrypoints.openai.api_server")
    """Of the engine's own Python. Not `vllm serve`: the CPU build's script dies looking for a distribution `vllm`."""
    health_path = "/health"
    models_path = "/v1/models"
    metrics_path = "/metrics"
    version_path = "/version"

    def arguments(self, launch: command.Launch) -> list[str]:
        """Everything behind `program`."""
        return command.arguments(launch)

    def environment(self, launch: command.Launch) -> dict[str, str]:
        """Variables set for the node, on top of those it inherits."""
        return command.environment(launch)

    def inherits(self, name: str) -> bool:
        """Whether a variable of the launcher's own environment reaches a node."""
        return command.inherits(name)

    def transfer_ports(self, connector: Connector, workers: int) -> int:
        """How many ports the transfer engines of a node bind."""
        return PORTS_PER_TRANSFER_ENGINE * connector.transfer_engines * workers

    def facts(self, models: bytes, metrics_text: bytes, version: bytes) -> NodeFacts:
        """From the answers of the paths above. Raises ValueError when they are not those of this engine."""
        try:
            cards = metrics.model_cards(orjson.loads(models))
            text = metrics_text.decode("utf-8", "replace")
            gauges, cache = metrics.gauges(text), metrics.cache_config(text)
            found = orjson.loads(version)
        except (TypeError, KeyError, AttributeError, IndexError) as exc:
            raise ValueError("not the answers of a vLLM server") from exc
        said = found.get("version") if isinstance(found, dict) else None
        layout, cache_tokens = metrics.cache_layout(cache), metrics.cache_tokens(cache)
        return NodeFacts(cards, gauges, said if isinstance(said, str) else "", layout, cache_tokens)

    def prefill_leg(
        self, route: Route, asked: Asked, transfer_params: JSONObject | None, *, judges_all: bool = False
    ) -> JSONObject:
        return bodies.prefill_body(route, asked, transfer_params, judges_all=judges_all)

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
        return versions.survives_refusals(version)

    def may_refuse(self, asked: Asked, prompt_tokens: int, max_model_len: int | None) -> bool:
        return versions.may_refuse(asked.body, prompt_tokens, max_model_len)

    def version_problem(self, version: str) -> str:
        return versions.problem(version)

    def version_family(self, version: str) -> str:
        return versions.family(version)
