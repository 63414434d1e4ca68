"""The simulator behind the words of `Engine`: it speaks as vLLM does."""

from ..vllm.engine import VLLM


class Simulator(VLLM):
    """Nothing is different but the name; its version is no number, and its decode nodes survive refusals."""

    name = "simulated vLLM"
