"""What the prefix cache of one prefill node holds, as far as this proxy's own requests tell.

The node frees the blocks that were used longest ago, a prompt's last ones first; so does this. It would rather think
too much cached than too little: believed to be half as large as it is, a cache is hardly made use of, while twice its
size costs nothing (ROUTING.md, A6). The node's own count of cached tokens corrects it.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from .prompts import Prompt

MOST_KEYS = 131_072
"""Of one cache: some 15 MB. At 64 tokens a key, eight million tokens."""
MOST_TOKENS = 1 << 40
"""A capacity beyond it is none: whatever a node says."""


@dataclass(slots=True, eq=False)
class _Segment:
    """Pieces that follow each other and have been used by the same requests."""

    keys: tuple[int, ...]
    own: float
    """Tokens of each piece."""
    sent: int
    """Number of the request that sent it first."""
    touched: int
    """... of the last one that used it. No segment is touched later than the one before it in its prompt."""
    computed: bool = False
    """A prefill of it has ended, so the node must have had it."""

    @property
    def tokens(self) -> float:
        return self.own * len(self.keys)


@dataclass(slots=True)
class Expected:
    """What was known of a prompt when it was sent."""

    request: int = 0
    """Number of the request."""
    pieces: int = 0
    """Of the prompt that the node has cached, or will have by the time it comes to it."""
    certain: float = 0.0
    """Tokens of those for which a prefill had ended by then, as the node has counted them."""
    touched: tuple[tuple[float, int], ...] = ()
    """Of each segment of the certain ones: the tokens up to its end, and the request that had used it last."""


class PrefixModel:
    """The cache of one data-parallel rank of a node."""

    def __init__(self, capacity: int | None = None) -> None:
        """`capacity`: in tokens; None when the node does not say."""
        self._at: dict[int, _Segment] = {}
        self._used: OrderedDict[_Segment, None] = OrderedDict()
        """The one that was used longest ago first; of one prompt's the last one first."""
        self._tokens = 0.0
        self._requests = 0
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self._at)

    @property
    def tokens(self) -> float:
        """That it believes to be cached."""
        return self._tokens

    def cached(self, prompt: Prompt) -> float:
        """Tokens of the prompt that it believes to be cached: of as many as the prompt is believed to have."""
        return self._depth(prompt.keys) * prompt.piece_tokens

    def sent(self, prompt: Prompt) -> Expected:
        """The node gets this prompt, and will have all of it cached."""
        self._requests += 1
        depth = self._depth(prompt.keys)
        known = self._known(prompt.keys, depth)
        expected = _expected(self._requests, known)
        if depth < len(prompt.keys):
            self._add(_Segment(prompt.keys[depth:], prompt.piece_tokens, self._requests, self._requests))
        for segment in reversed(known):
            segment.touched = self._requests
            self._used.move_to_end(segment)
        self._keep_within_capacity()
        return expected

    def computed(self, prompt: Prompt, expected: Expected, cached: int | None, slack: int) -> None:
        """The node has computed it. `prompt.tokens` and `cached` are its own counts; `slack`: how many tokens fewer
        than expected are no surprise.

        What it no longer had, it had not used for longest; so it has nothing left that was used before that either.
        """
        own = prompt.piece_tokens
        for segment in self._parts(prompt.keys):
            self._tokens += (own - segment.own) * len(segment.keys)
            segment.own, segment.computed = own, True
        if cached is not None and cached + slack < expected.certain:
            gone = (touched for tokens, touched in expected.touched if tokens > cached + slack)
            self._forget_until(max(gone, default=0))

    def lost(self, prompt: Prompt, expected: Expected) -> None:
        """The prefill failed: what nobody has computed, and nobody else has asked for, is not there."""
        for segment in self._parts(prompt.keys):
            if not segment.computed and segment.sent == segment.touched == expected.request:
                self._shorten(segment, len(segment.keys))

    def clear(self) -> None:
        """The node has started anew."""
        self._at.clear()
        self._used.clear()
        self._tokens = 0.0

    def _depth(self, keys: tuple[int, ...]) -> int:
        """How many pieces are there: where one is, all before it are."""
        at = self._at
        if not keys or keys[0] not in at:
            return 0
        low, high = 1, len(keys)
        while low < high:
            middle = (low + high + 1) // 2
            if keys[middle - 1] in at:
                low = middle
            else:
                high = middle - 1
        return low

    def _known(self, keys: tuple[int, ...], depth: int) -> list[_Segment]:
        """The segments of the first so many pieces, which are there; the last one is cut in two where it goes on."""
        found = list[_Segment]()
        reached = 0
        while reached < depth:
            segment = self._at[keys[reached]]
            if reached + len(segment.keys) > depth:
                segment = self._cut(segment, depth - reached)
            found.append(segment)
            reached += len(segment.keys)
        return found

    def _parts(self, keys: tuple[int, ...]) -> list[_Segment]:
        """The segments that are parts of a prompt, as far as they are still there. Of one that goes on another request
        will say what became of it.
        """
        found = list[_Segment]()
        reached = 0
        while reached < len(keys) and (segment := self._at.get(keys[reached])) is not None:
            reached += len(segment.keys)
            if reached <= len(keys):
                found.append(segment)
        return found

    def _cut(self, segment: _Segment, pieces: int) -> _Segment:
        """The first so many pieces of it, as a segment of their own."""
        first = _Segment(segment.keys[:pieces], segment.own, segment.sent, segment.touched, segment.computed)
        segment.keys = segment.keys[pieces:]
        self._tokens -= first.tokens
        self._add(first)
        return first

    def _add(self, segment: _Segment) -> None:
        self._at.update(dict.fromkeys(segment.keys, segment))
        self._used[segment] = None
        self._tokens += segment.tokens

    def _keep_within_capacity(self) -> None:
        capacity = MOST_TOKENS if self.capacity is None else min(self.capacity, MOST_TOKENS)
        while self._used and (self._tokens > capacity or len(self._at) > MOST_KEYS):
            oldest = next(iter(self._used))
            pieces = max(len(self._at) - MOST_KEYS, math.ceil((self._tokens - capacity) / (oldest.own or math.inf)))
            self._shorten(oldest, max(pieces, 1))

    def _forget_until(self, request: int) -> None:
        while self._used and (oldest := next(iter(self._used))).touched <= request:
            self._shorten(oldest, len(oldest.keys))

    def _shorten(self, segment: _Segment, pieces: int) -> None:
        """Drop its last pieces, so many or all."""
        left = max(len(segment.keys) - pieces, 0)
        self._tokens -= segment.tokens
        for key in segment.keys[left:]:
            del self._at[key]
        segment.keys = segment.keys[:left]
        self._tokens += segment.tokens
        if not left:
            del self._used[segment]


def _expected(request: int, known: list[_Segment]) -> Expected:
    if not known:
        return Expected(request)
    certain = 0.0
    touched = list[tuple[float, int]]()
    for segment in known:
        if not segment.computed:
            break
        certain += segment.tokens
        touched.append((certain, segment.touched))
    return Expected(request, sum(len(segment.keys) for segment in known), certain, tuple(touched))
