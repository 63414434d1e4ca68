"""What of a request decides which part of a prefill node's prefix cache it finds: chained keys over its prompt.

Without a tokenizer: over the bytes that become the prompt, in pieces of a fixed size; a prompt of token ids in pieces
of ids. Two requests whose prompts begin alike have their first keys in common.
"""

import zlib
from dataclasses import dataclass
from itertools import accumulate, count, repeat
from operator import xor
from typing import Any

import orjson

from engines.base import JSONObject
from engines.openai.request import is_ids

PIECE_BYTES = 256
PIECE_IDS = 64
MOST_PIECES = 2048
"""Half a megabyte of text. What comes behind it makes no difference to the choice of a node."""
_IN_ORDER = ("tools", "system", "instructions", "prompt", "messages", "input")
"""The parts of a prompt, as chat templates put them: tools are told before anything is said."""
_FOR_ALL_OF_IT = ("model", "cache_salt", "chat_template", "chat_template_kwargs", "documents", "reasoning_effort")
"""Where these differ nothing is shared: vLLM keys its blocks by adapter and salt, and templates begin differently."""


@dataclass(slots=True)
class Prompt:
    """The prompt of one request."""

    keys: tuple[int, ...] = ()
    """The n-th stands for everything up to the end of the n-th piece; a last piece that is not whole has none."""
    pieces: float = 1.0
    """How many pieces all of it is; the last one may be a part."""
    tokens: int = 0
    """About how many it has in all; exactly, once a node has said so."""
    guess: int = 0
    """What `tokens` was before it was corrected by experience; 0 for a prompt of ids, which are counted."""
    session: bytes = b""
    """The client's X-Session-ID: of nodes that are equal otherwise each session has one of its own."""

    @property
    def piece_tokens(self) -> float:
        """Of each piece."""
        return self.tokens / self.pieces

    def turn_at(self, place: str) -> int:
        """Of the session at a place: the lowest is its own, in every process and in every life of the proxy."""
        return zlib.crc32(self.session + place.encode()) if self.session else 0


def without_keys(body: JSONObject, tokens: int, session: bytes = b"") -> Prompt:
    """... where the choice does not depend on what is cached."""
    return Prompt(tokens=tokens, guess=0 if _are_ids(body.get("prompt")) else tokens, session=session)


def prompt_of(body: JSONObject, tokens: int, session: bytes = b"") -> Prompt:
    """`tokens`: an estimate (`Asked.tokens`). Never raises: what cannot be a prompt has no keys."""
    found = without_keys(body, tokens, session)
    found.keys, found.pieces = _keys_of(body)
    return found


def _keys_of(body: JSONObject) -> tuple[tuple[int, ...], float]:
    """The keys, and how many pieces all of the prompt is."""
    seed = hash(_bytes([body.get(name) for name in _FOR_ALL_OF_IT]))
    ids = body.get("prompt")
    if isinstance(ids, list) and ids and is_ids(ids):
        whole: list[Any] = [tuple(ids[at : at + PIECE_IDS]) for at in _starts(len(ids), PIECE_IDS)]
        return _chained(seed, whole), len(ids) / PIECE_IDS
    text = b"".join([_text(body[name]) for name in _IN_ORDER if body.get(name)])
    whole = [text[at : at + PIECE_BYTES] for at in _starts(len(text), PIECE_BYTES)]
    return _chained(seed, whole), len(text) / PIECE_BYTES or 1.0


def _chained(seed: int, pieces: list[Any]) -> tuple[int, ...]:
    """The n-th is the exclusive or of the hashes of the first n pieces, each with its place: all of it in C."""
    hashes = map(hash, zip(repeat(seed), count(), pieces))
    return tuple(accumulate(hashes, xor))


def _are_ids(prompt: Any) -> bool:
    """By the first, of what was not looked at whole."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _starts(size: int, piece: int) -> range:
    """Of the pieces that are whole."""
    return range(0, min(size - piece, (MOST_PIECES - 1) * piece) + 1, piece)


def _text(value: Any) -> bytes:
    """JSON text without its end, so that a conversation that goes on begins as it did before."""
    return _bytes(value)[:-1]


def _bytes(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # half a surrogate in it, or too deep: its node will refuse it
        return b""
