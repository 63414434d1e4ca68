"""Machines that are not here, as facts: what `pd-launch facts --json` would say on them."""

import json
from pathlib import Path
from typing import Any

from launcher.plan.facts import HostFacts

FOLDER = Path(__file__).parent / "launcher" / "machines"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))


def machine(name: str = "laptop", **changes: Any) -> HostFacts:
    """The facts of a file; what is not in it is as on the laptop."""
    usual = json.loads((FOLDER / "laptop.json").read_text())
    facts = HostFacts.model_validate(usual | json.loads((FOLDER / f"{name}.json").read_text()))
    return facts.model_copy(update=changes)
