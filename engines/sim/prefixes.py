"""A node's prefix cache: whole blocks of prompts, the one that was used longest ago given up first."""

from collections import OrderedDict
from itertools import accumulate


class PrefixCache:
    """Of one data-parallel rank."""

    def __init__(self, block_tokens: int, total_blocks: int) -> None:
        self._block_tokens = block_tokens
        self._total_blocks = total_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def compute(self, prompt: tuple[int, ...]) -> int:
        """Compute a prompt; how many of its tokens were there."""
        found = self.found(prompt)
        for key in reversed(self._keys(prompt)):  # a prompt's last blocks are given up first
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._total_blocks:
            self._blocks.popitem(last=False)
        return found

    def found(self, prompt: tuple[int, ...]) -> int:
        """How many of its tokens are there; never all of them, for the last one must be computed."""
        keys, size = self._keys(prompt), self._block_tokens
        blocks = next((number for number, key in enumerate(keys) if key not in self._blocks), len(keys))
        return min(blocks, (len(prompt) - 1) // size) * size

    def _keys(self, prompt: tuple[int, ...]) -> list[int]:
        size = self._block_tokens
        pieces = [prompt[at : at + size] for at in range(0, len(prompt) - size + 1, size)]
        return list(accumulate(pieces, lambda parent, piece: hash((parent, piece)), initial=0))[1:]
