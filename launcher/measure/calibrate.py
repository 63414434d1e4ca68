"""How long a prefill node and a decode node take, measured on a running pair in about two minutes."""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from statistics import median
from typing import Any

import httpx

from engines.base import Role
from engines.performance import Constants
from engines.vllm import metrics
from engines.vllm.command import given

from ..errors import LauncherError
from ..events.events import Events
from ..plan.config import LaunchConfig
from ..plan.plan import NodeProcess, Plan
from ..run import proof
from . import load
from .fit import Point, errors, fit
from .loadgen import Planned, Row
from .workload import Workload

_LENGTHS = 5
_TRIES = 3
_BATCHES = (1, 2, 4, 8, 16, 32)
_FEWEST_STEPS = 24
_FEWEST_MEASURED = 3
_PUBLISHED_WITHIN_S = 10.0
_SHARE_OF_KV = 0.8


@dataclass(frozen=True, slots=True)
class Measured:
    """All points, and the constants that fit them."""

    constants: Constants
    prefill: list[tuple[int, float]]
    """(prompt tokens, seconds)."""
    decode: list[tuple[int, int, float]]
    """(sequences, tokens of their KV, seconds of a step)."""
    hand_off: list[tuple[int, float]]
    """(prompt tokens, seconds)."""

    def errors(self) -> dict[str, float]:
        """Of each kind, the largest relative error of its own points, which the constants predict again."""
        points = {
            "prefill": (_prefill_points(self.prefill), self.constants.prefill),
            "decode": (_decode_points(self.decode), self.constants.decode),
            "hand_off": (_hand_off_points(self.hand_off), self.constants.hand_off),
        }
        return {name: max(map(abs, errors(some, fitted)), default=0.0) for name, (some, fitted) in points.items()}

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"constants": self.constants.model_dump()}


async def calibrate(
    plan: Plan, config: LaunchConfig, workload: Workload, vocabulary: Sequence[int], events: Events
) -> Measured:
    """Raises LauncherError, httpx.HTTPError."""
    async with httpx.AsyncClient(trust_env=False, timeout=900) as client:
        bench = _Bench(client, plan, vocabulary)
        room = await bench.room()
        lengths = _lengths(workload, room)
        with events.step("warm-up"):
            await bench.warm_up(lengths)
        with events.step("prefill"):
            prefill = [(tokens, (await bench.prefill_s(tokens))[0]) for tokens in lengths]
        with events.step("decode"):
            decode = [point async for point in bench.steps(lengths, room)]
        prefill_constants = fit(_prefill_points(prefill))
        decode_constants = fit(_decode_points(decode))
        with events.step("hand-off"):
            hand_off, rest = await bench.hand_offs(lengths, decode_constants)
    constants = Constants.model_validate(
        {
            "prefill": prefill_constants, "decode": decode_constants,
            "hand_off": fit(_hand_off_points(hand_off)) if hand_off else (0.0, 0.0),
            "rest_s": rest, "kv_tokens": room, **_limits(config, plan.of(Role.DECODE)[0]),
        }
    )  # fmt: skip
    return Measured(constants, prefill, decode, hand_off)


def _limits(config: LaunchConfig, node: NodeProcess) -> dict[str, int]:
    """Those that are given as plain numbers; of the others (vLLM reads 8k, too) the model's own hold."""
    flags = given(config.arguments_of(node.role, node.name))
    named = {"sequences": flags.get("--max-num-seqs", ""), "step_tokens": flags.get("--max-num-batched-tokens", "")}
    return {name: int(text) for name, text in named.items() if text.isdecimal()}


def _lengths(workload: Workload, room: int) -> list[int]:
    """From the shortest prompts to the longest, in equal proportions."""
    prompts = sorted(request.tokens for request in workload.requests)
    low, high = max(prompts[len(prompts) // 20], 16), min(prompts[-1], int(_SHARE_OF_KV * room))
    low = min(low, max(high // 4, 16))
    return sorted({round(low * (high / low) ** (n / (_LENGTHS - 1))) for n in range(_LENGTHS)})


class _Bench:
    """Asks a pair, one thing at a time."""

    def __init__(self, client: httpx.AsyncClient, plan: Plan, vocabulary: Sequence[int]) -> None:
        self._client = client
        self._plan = plan
        self._vocabulary = vocabulary
        self._prefill, self._decode = plan.of(Role.PREFILL)[0], plan.of(Role.DECODE)[0]
        self._numbers = count()

    async def room(self) -> int:
        """Tokens of KV. Raises LauncherError."""
        text = (await self._client.get(f"{self._decode.url}/metrics")).text
        told = metrics.cache_config(text)
        blocks, size = told.get("num_gpu_blocks", ""), told.get("block_size", "")
        if not (blocks.isdecimal() and size.isdecimal()):
            raise LauncherError(f"{self._decode.name} does not say how much KV it has room for")
        return int(blocks) * int(size)

    async def warm_up(self, lengths: Sequence[int]) -> None:
        """Both nodes, at every length: the first of a kind takes longer."""
        for tokens in lengths:
            await self._ask(self._plan.proxy_url, self._body(tokens, 4), proof.key(self._plan))
            await self._ask(self._decode.url, self._body(tokens, 4), proof.node_key(self._plan))

    def _body(self, tokens: int, output: int) -> dict[str, Any]:
        """A prompt that nobody has asked before."""
        chance = random.Random(f"size {next(self._numbers)}")  # noqa: S311
        return {
            "model": self._plan.served_model_name, "prompt": chance.choices(self._vocabulary, k=tokens),
            "max_tokens": output, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip

    async def _ask(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> float:
        """Seconds until the whole answer. Raises LauncherError."""
        began = time.monotonic()
        answer = await self._client.post(f"{url}/v1/completions", json=body, headers=headers)
        if not answer.is_success:
            raise LauncherError(f"{url} answered {answer.status_code}: {answer.text[:200]}")
        return time.monotonic() - began

    async def prefill_s(self, tokens: int) -> tuple[float, float]:
        """(as the engine counts it, in all). The least of each: whatever else the machine does only adds to it."""
        tried = [await self._phases_of(self._prefill, self._body(tokens, 1)) for _ in range(_TRIES)]
        return min(engine_s for engine_s, _ in tried), min(whole_s for _, whole_s in tried)

    async def _phases_of(self, node: NodeProcess, body: dict[str, Any]) -> tuple[float, float]:
        """(seconds of prefill in the engine, seconds in all)."""
        before = await self._phase(node)
        took = await self._ask(node.url, body, proof.node_key(self._plan))
        deadline = time.monotonic() + _PUBLISHED_WITHIN_S
        while (now := await self._phase(node))[1] == before[1]:
            if time.monotonic() > deadline:
                raise LauncherError(f"{node.name} does not count its requests' time in /metrics")
            await asyncio.sleep(0.05)
        return now[0] - before[0], took

    async def _phase(self, node: NodeProcess) -> tuple[float, float]:
        return metrics.phases((await self._client.get(f"{node.url}/metrics")).text)["prefill"]

    async def steps(self, lengths: Sequence[int], room: int) -> Any:
        """(sequences, tokens of their KV, seconds of a step) for batches of short and of longer prompts."""
        for context in (lengths[0], lengths[len(lengths) // 2]):
            for batch in _BATCHES:
                output = _FEWEST_STEPS + 2 * batch
                if batch * (context + output) > _SHARE_OF_KV * room:
                    break
                point = await self._step(batch, context, output)
                if point is not None:
                    yield point

    async def _step(self, batch: int, context: int, output: int) -> tuple[int, int, float] | None:
        """While all of them run; None when they never did."""
        plan: Iterator[Planned] = (
            (number, 0.0, self._body(context, output) | _STREAMED, {}) for number in range(batch)
        )
        rows = await load.run(self._decode.url, proof.node_key(self._plan), plan, wants_times=True)
        if any(row.problem for row in rows):
            raise LauncherError(f"{self._decode.name}: {next(row.problem for row in rows if row.problem)}")
        begin, end = max(row.first for row in rows), min(row.last for row in rows)
        at_begin, at_end = (sum(_made(row, at) for row in rows) / batch for at in (begin, end))
        if at_end - at_begin < _FEWEST_MEASURED:
            return None
        live = batch * (context + (at_begin + at_end) / 2)
        return batch, round(live), (end - begin) / (at_end - at_begin)

    async def hand_offs(self, lengths: Sequence[int], decode: Sequence[float]) -> tuple[list[tuple[int, float]], float]:
        """What is left of an answer of one token through the proxy, where that is more than nothing; and the time on
        the way, of the prefill leg.
        """
        found, rests = list[tuple[int, float]](), list[float]()
        for tokens in lengths:
            engine_s, whole_s = await self.prefill_s(tokens)
            key = proof.key(self._plan)
            through = min([await self._ask(self._plan.proxy_url, self._body(tokens, 1), key) for _ in range(_TRIES)])
            step = decode[0] + decode[1] + decode[2] * tokens
            rests.append(whole_s - engine_s)
            if through > whole_s + step:
                found.append((tokens, through - whole_s - step))
        return found, max(median(rests), 0.0)


_STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def _made(row: Row, at: float) -> int:
    """Tokens of an answer until then."""
    return max((tokens for when, tokens in row.times if when <= at), default=0)


def _prefill_points(measured: Sequence[tuple[int, float]]) -> list[Point]:
    return [((1.0, float(tokens), float(tokens) ** 2), seconds) for tokens, seconds in measured]


def _decode_points(measured: Sequence[tuple[int, int, float]]) -> list[Point]:
    return [((1.0, float(batch), float(live)), seconds) for batch, live, seconds in measured]


def _hand_off_points(measured: Sequence[tuple[int, float]]) -> list[Point]:
    return [((1.0, float(tokens)), seconds) for tokens, seconds in measured]
