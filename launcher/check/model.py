"""The model: where it is, and whether it can be cut as it is asked for."""

from collections.abc import Iterator
from pathlib import Path

from engines.base import NodeRole
from engines.known import ENGINES

from ..plan.config import TINY_MODEL, LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import Plan
from ..plan.planner import is_local
from .findings import Finding, error


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    if ENGINES[config.engine].is_simulated:
        return None
    if config.model == TINY_MODEL:
        return "the tiny model, made here", iter(())
    if is_local(config, facts):
        return plan.model, _of_folder(config, plan, facts)
    how = "fetched before anything starts" if plan.download else "the engines look it up themselves"
    return f"{config.model}, {how}", iter(())


def _of_folder(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    model = facts.model
    if not model.exists:
        yield error(f"--model {config.model}: no such folder", "", "Give a folder with a config.json, or a name")
    elif model.is_folder and not model.has_config:
        yield error(f"--model {config.model} has no config.json in it", "", "Is it the model's own folder?")
    elif not model.is_folder and Path(config.model).suffix != ".gguf":
        yield error(f"--model {config.model} is a file", "", "Give the model's folder")
    for role in NodeRole:
        tensor = next((node.seat.tensor for node in plan.of_kind(role)), 1)
        if model.attention_heads and model.attention_heads % tensor:
            yield error(
                f"{role} nodes: the model's {model.attention_heads} attention heads cannot be split over {tensor} GPUs",
                "Each GPU of a node takes as many heads as the others",
                "Choose a --tensor-parallel that divides them",
            )
