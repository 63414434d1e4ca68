"""The simulator behind the words of `Engine`: it speaks as vLLM does."""

from ..base import Connector
from ..vllm.engine import VLLM


class Simulator(VLLM):
    """Nothing is different but the name; its version is no number, and its decode nodes survive refusals.

    Its nodes run in the launcher's own Python, and no transfer engine is in them.
    """

    name = "simulated vLLM"
    is_simulated = True
    program: tuple[str, ...] = ("-P", "-m", "engines.sim")

    def transfer_ports(self, connector: Connector, workers: int) -> int:
        del connector, workers
        return 0
