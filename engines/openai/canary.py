"""The KV canary: one question, answered with KV that came from a prefill node and by the decode node alone.

Engines compare nothing of what they exchange: a KV layout, a rope setting or weights that differ give fluent nonsense,
and no error. So a decode node is asked a greedy question alone; then the pair is asked for what follows the first token
of that answer. Like is compared with like: either way the decode node makes these tokens one by one, out of KV that a
prefill wrote, its own or the prefill node's. What is compared is how likely the model itself finds its best candidates:
that differs by rounding between nodes of unlike hardware, and by much more when the KV is not what it should be.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import orjson

from ..base import JSONObject

ANSWER_TOKENS = 16
CANDIDATES = 10
MOST_APART = 0.2
"""In nats of log probability, the mean over all candidates compared. Rounding makes some hundredths of a nat (bfloat16,
another tensor-parallel size), wrong KV one or more."""

_WORDS = (
    "amber", "birch", "copper", "delta", "ember", "falcon", "garnet", "harbor", "indigo", "juniper", "kernel",
    "lantern", "marble", "nectar", "onyx", "prairie", "quartz", "raven", "saffron", "timber", "umber", "velvet",
    "willow", "xenon", "yarrow", "zephyr",
)  # fmt: skip
_ENTRIES = tuple(f"{_WORDS[number % len(_WORDS)]} {(37 * number + 11) % 100}" for number in range(80))
PROMPT = f"{', '.join(_ENTRIES)}. Again: {', '.join(_ENTRIES[:3])},"
"""A list, and its beginning once more: how it goes on stands in one place, far back. Several blocks of KV long."""


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer."""

    token: str
    chances: Mapping[str, float]
    """Log probabilities of the most likely tokens, this one among them; not a number where the node could tell none."""


@dataclass(frozen=True, slots=True)
class Alone:
    """What a decode node says by itself."""

    prompt: list[int]
    first: int
    """The answer's first token, which its prefill made."""
    steps: tuple[Step, ...]
    """The others."""


def question(model: str, salt: str, max_model_len: int | None) -> JSONObject:
    """A completion's body, for the decode node alone. `salt`: a new one each time, so that no prefix cache can stand in
    for KV that should have been computed or moved.
    """
    prompt = PROMPT
    if max_model_len is not None:  # ASCII: never more tokens than characters, and one for the beginning
        prompt = PROMPT[-max(max_model_len - ANSWER_TOKENS - 2, 1) :]
    return _asked(model, salt, prompt, ANSWER_TOKENS + 1)


def continuation(model: str, salt: str, alone: Alone) -> JSONObject:
    """The body for the pair: what follows the first token of the answer `alone`."""
    return _asked(model, salt, [*alone.prompt, alone.first], ANSWER_TOKENS)


def _asked(model: str, salt: str, prompt: str | list[int], tokens: int) -> JSONObject:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "repetition_penalty": 1,  # a model's own default would change what is chosen, and not the chances that are told
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logprobs": CANDIDATES,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "cache_salt": salt,
        "stream": False,
    }


def alone(raw: bytes) -> Alone:
    """The answer to `question`. Raises ValueError when it is none."""
    choice = _choice(raw)
    try:
        prompt, first = [int(token) for token in choice["prompt_token_ids"]], int(choice["token_ids"][0])
    except (KeyError, IndexError, TypeError) as exc:
        raise ValueError("no answer with token ids") from exc
    _, *others = _steps(choice, ANSWER_TOKENS + 1)
    if any(math.isnan(step.chances[step.token]) for step in others):
        raise ValueError("an answer without log probabilities")
    return Alone(prompt, first, tuple(others))


def steps(raw: bytes) -> tuple[Step, ...]:
    """The tokens of the answer to `continuation`. Raises ValueError when it is none."""
    return _steps(_choice(raw), ANSWER_TOKENS)


def difference(own: tuple[Step, ...], handed_over: tuple[Step, ...]) -> str | None:
    """What in the second answer cannot be rounding, in words; None when all can.

    All steps up to the first other token are compared; behind it the answers go on from different texts.
    """
    apart: list[float] = []
    for number, (mine, other) in enumerate(zip(own, handed_over, strict=True), 1):
        apart += _apart(mine, other)
        if mine.token != other.token or number == len(own):
            mean = fmean(apart)
            if not mean <= MOST_APART:  # nor is what is not a number
                said = f"{other.token} for {mine.token}" if mine.token != other.token else "the same"
                return f"token {number} is {said}, and log probabilities are {mean:.2f} nats apart in the mean"
            return None
    raise ValueError("nothing to compare")


def _apart(own: Step, other: Step) -> list[float]:
    """How far the candidates' chances are apart; of one that the other does not list, how far at least."""
    least = min(other.chances.values())
    return [
        abs(chance - other.chances[token]) if token in other.chances else max(0.0, chance - least)
        for token, chance in own.chances.items()
    ]


def _choice(raw: bytes) -> JSONObject:
    try:
        choice: Any = orjson.loads(raw)["choices"][0]
    except (KeyError, IndexError, TypeError) as exc:
        raise ValueError("no answer of a completion") from exc
    if not isinstance(choice, dict):
        raise ValueError("no answer of a completion")
    return choice


def _steps(choice: JSONObject, count: int) -> tuple[Step, ...]:
    try:
        said = choice["logprobs"]
        places = zip(said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True)
        found = tuple(
            Step(str(token), {str(one): _chance(value) for one, value in {**(others or {}), token: chance}.items()})
            for token, chance, others in places
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError("no answer with log probabilities") from exc
    if len(found) != count:
        raise ValueError(f"an answer of {len(found)} tokens, not {count}")
    return found


def _chance(value: float | None) -> float:
    """Null is how JSON says that it is not a number."""
    return math.nan if value is None else float(value)
