"""Tokenizer, chat template and the "model": the next token is a hash of every token before it.

So an answer depends on the whole prompt (the wrong KV gives another answer), is the same on every node, and goes on
the same way from a prompt that already contains its beginning.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from ..base import JSONObject

UNK, BOS, EOS, USER, ASSISTANT = range(5)
_SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
_FIRST_BYTE = len(_SPECIAL)
_FIRST_WORD = _FIRST_BYTE + 256
_WORDS = (
    " the", " a", " of", " to", " in", " and", " is", " it", " for", " on", " with", " as", " from", " prompt",
    " token", " cache", " block", " prefill", " decode", " node", " leg", " hand", " key", " value", " engine",
    " proxy", " stream", " answer", " model", " batch", " first", " next", " queue", " memory", " page", " layer",
)  # fmt: skip
VOCABULARY = _FIRST_WORD + len(_WORDS)
_CHANCE_OF_EOS = 1 / 48


def encode(text: str) -> list[int]:
    """One token a byte: what a model says in words comes back longer, as with a real tokenizer."""
    return [_FIRST_BYTE + byte for byte in text.encode("utf-8", "surrogatepass")]


def decode(ids: Sequence[int]) -> str:
    return b"".join(_bytes_of(token) for token in ids).decode("utf-8", "replace")


def token_text(token: int) -> str:
    return _bytes_of(token).decode("utf-8", "replace")


def render_chat(messages: Sequence[JSONObject], body: JSONObject) -> list[int]:
    """The chat template: everything that may change a real one's output changes this one's too."""
    ids = [BOS]
    for message in messages:
        ids.append(ASSISTANT if message.get("role") == "assistant" else USER)
        if message.get("role") not in ("user", "assistant"):
            ids += encode(f"{message.get('role')}: ")
        ids += encode(_content_text(message.get("content")) + "\n")
    for field in ("tools", "documents", "chat_template_kwargs", "reasoning_effort"):
        if body.get(field):
            ids += encode(orjson.dumps(body[field]).decode() + "\n")
    if body.get("add_generation_prompt", True):
        ids.append(ASSISTANT)
    return ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """The fields that decide which token comes next, and when there is none."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    allowed_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    salt: int = 0
    """0 when greedy; else made of seed and choice, so that samples differ."""


def generate(prompt: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, str | None]]:
    """(token, finish reason or None) until one is given."""
    state = zlib.crc32(array("I", prompt).tobytes(), sampling.salt)
    for count in range(1, sampling.max_tokens + 1):
        token = _next_token(state, count, sampling)
        state = zlib.crc32(token.to_bytes(4, "little"), state)
        may_stop = count > sampling.min_tokens
        if may_stop and ((token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids):
            yield token, "stop"
            return
        yield token, "length" if count == sampling.max_tokens else None


def _next_token(state: int, count: int, sampling: Sampling) -> int:
    forced = max(sampling.logit_bias, key=lambda item: item[1], default=None)
    if forced is not None and forced[1] >= 50:
        return _unmasked(forced[0], state, count, sampling)
    if sampling.allowed_token_ids:
        return sampling.allowed_token_ids[state % len(sampling.allowed_token_ids)]
    if (state >> 8) % 1000 < 1000 * _CHANCE_OF_EOS:
        return _unmasked(EOS, state, count, sampling)
    return _FIRST_WORD + state % len(_WORDS)


def _unmasked(token: int, state: int, count: int, sampling: Sampling) -> int:
    """VLLM masks EOS and stop ids until `min_tokens` are out."""
    masked = count <= sampling.min_tokens and (token == EOS or token in sampling.stop_token_ids)
    return _FIRST_WORD + state % len(_WORDS) if masked else token


def _bytes_of(token: int) -> bytes:
    if token >= _FIRST_WORD:
        return _WORDS[(token - _FIRST_WORD) % len(_WORDS)].encode()
    if token >= _FIRST_BYTE:
        return bytes([token - _FIRST_BYTE])
    return b"" if token in (BOS, EOS) else _SPECIAL[token].encode()


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return ""
