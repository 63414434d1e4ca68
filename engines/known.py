"""The engines by the name that a topology has for them."""

from typing import Literal

from .base import Engine
from .sim.engine import Simulator
from .vllm.engine import VLLM

EngineName = Literal["vllm", "sim"]

ENGINES: dict[EngineName, Engine] = {"vllm": VLLM(), "sim": Simulator()}
