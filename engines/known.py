"""The engines by the name that a topology has for them."""

from typing import Literal

from .sim.engine import Simulator
from .vllm.engine import VLLM

EngineName = Literal["vllm", "sim"]

ENGINES: dict[EngineName, VLLM] = {"vllm": VLLM(), "sim": Simulator()}
"""What a node runs: as the proxy sees it `engines.base.Engine`, and what the launcher starts it by."""
