"""What the prefix cache of one prefill node holds, as far as this proxy's own requests tell.

The node frees the blocks that were used longest ago, a prompt's last ones first; so does this. It would rather think
too much cached than too little: believed to be half as large as it is, a cache is hardly made use of, while twice its
size costs nothing (ROUTING.md, A6). The node's own count of cached tokens corrects it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

from .prompts import Prompt

MOST_KEYS = 131_072
"""Of one cache: some 30 MB. At 64 tokens a key, eight million tokens."""
MOST_TOKENS = 1 << 40
"""A capacity beyond it is none: whatever a node says."""


@dataclass(slots=True)
class _Entry:
    """The end of a piece of some prompt."""

    tokens: float
    """From the beginning of the prompt to here."""
    own: float
    """Of this piece."""
    touched: int
    """Number of the last request that used it."""
    computed: bool = False
    """A prefill of it has ended, so the node must have had it."""


@dataclass(slots=True)
class Expected:
    """What was known of a prompt when it was sent."""

    request: int = 0
    """Number of the request."""
    cached: float = 0.0
    """Tokens that the node has cached, or will have by the time it comes to this prompt."""
    certain: float = 0.0
    """... of which a prefill had ended by then."""
    touched: tuple[tuple[float, int], ...] = ()
    """Of each piece of the certain ones: the tokens up to its end, and the request that had used it last."""


class PrefixModel:
    """The cache of one data-parallel rank of a node."""

    def __init__(self, capacity: int | None = None) -> None:
        """`capacity`: in tokens; None when the node does not say."""
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._tokens = 0.0
        self._requests = 0
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> float:
        """That it believes to be cached."""
        return self._tokens

    def cached(self, prompt: Prompt) -> float:
        """Tokens of the prompt that it believes to be cached: of as many as the prompt is believed to have."""
        return self._depth(prompt) * prompt.piece_tokens

    def sent(self, prompt: Prompt) -> Expected:
        """The node gets this prompt, and will have all of it cached."""
        self._requests += 1
        expected = self._expected(prompt)
        own = prompt.piece_tokens
        for number in range(len(prompt.keys), 0, -1):
            key = prompt.keys[number - 1]
            entry = self._entries.get(key)
            if entry is None:
                self._entries[key] = _Entry(number * own, own, self._requests)
                self._tokens += own
            else:
                entry.touched = self._requests
                self._entries.move_to_end(key)
        self._keep_within_capacity()
        return expected

    def computed(self, prompt: Prompt, expected: Expected, cached: int | None, slack: int) -> None:
        """The node has computed it. `prompt.tokens` and `cached` are its own counts; `slack`: how many tokens fewer
        than expected are no surprise.

        What it no longer had, it had not used for longest; so it has nothing left that was used before that either.
        """
        own = prompt.piece_tokens
        for number, key in enumerate(prompt.keys, 1):
            entry = self._entries.get(key)
            if entry is not None:
                self._tokens += own - entry.own
                entry.tokens, entry.own, entry.computed = number * own, own, True
        if cached is not None and cached + slack < expected.certain:
            gone = (touched for tokens, touched in expected.touched if tokens > cached + slack)
            self._forget_until(max(gone, default=0))

    def lost(self, prompt: Prompt, expected: Expected) -> None:
        """The prefill failed: what nobody has computed, and nobody else has asked for since, is not there."""
        for key in prompt.keys:
            entry = self._entries.get(key)
            if entry is not None and not entry.computed and entry.touched == expected.request:
                self._drop(key, entry)

    def clear(self) -> None:
        """The node has started anew."""
        self._entries.clear()
        self._tokens = 0.0

    def _depth(self, prompt: Prompt) -> int:
        """How many pieces are there. Where one is, all before it are: they were touched later (`sent`). Failed
        prefills may leave a gap, which makes it a guess.
        """
        low, high = 0, len(prompt.keys)
        while low < high:
            middle = (low + high + 1) // 2
            if prompt.keys[middle - 1] in self._entries:
                low = middle
            else:
                high = middle - 1
        return low

    def _expected(self, prompt: Prompt) -> Expected:
        entries = list[_Entry]()
        for key in prompt.keys:
            if (entry := self._entries.get(key)) is None:
                break
            entries.append(entry)
        if not entries:
            return Expected(self._requests)
        certain = next((number for number, entry in enumerate(entries) if not entry.computed), len(entries))
        touched = [(entry.tokens, entry.touched) for entry in entries[:certain]]
        thinned = [(tokens, at) for (tokens, at), (_, then) in pairwise([*touched, (0.0, -1)]) if at != then]
        return Expected(self._requests, entries[-1].tokens, touched[-1][0] if touched else 0.0, tuple(thinned))

    def _keep_within_capacity(self) -> None:
        capacity = MOST_TOKENS if self.capacity is None else min(self.capacity, MOST_TOKENS)
        while self._entries and (self._tokens > capacity or len(self._entries) > MOST_KEYS):
            self._drop_oldest()

    def _forget_until(self, request: int) -> None:
        while self._entries and next(iter(self._entries.values())).touched <= request:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._tokens -= self._entries.popitem(last=False)[1].own

    def _drop(self, key: int, entry: _Entry) -> None:
        del self._entries[key]
        self._tokens -= entry.own
