"""Did KV move? A request through both legs, and the decode nodes' own counters before and after.

With a miswired transfer everything seems to work, while decode silently computes every prompt again; and a node's
`/health` is 200 before its peer can reach its transfer ports. A real request is the only proof.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from engines.base import Gauges, NodeRole, Role
from engines.transfer import Transfer
from engines.vllm import metrics

from ..errors import KVNotMovedError, LauncherError
from ..plan.plan import Plan

QUESTION = "Number {}. In one sentence: what happens when a prefill node hands the KV cache to a decode node?"
_ANSWER_TOKENS = 32
_STORED_LENGTH = 24
"""Times the question for a store, which takes whole blocks only (128 tokens on a CPU)."""
_STORE_TRIES = 5
_LONGER_TRIES = 6
_COUNTED_WITHIN_S = 15.0
_COMPARED_WITHIN_S = 300.0


class _TooShortError(Exception):
    """The proxy had a decode node answer the question alone."""


class _RefusedError(LauncherError):
    """The question itself was refused (400)."""


@dataclass(frozen=True, slots=True)
class Proof:
    """`transferred` of `prompt_tokens` came from a prefill node, says the decode node."""

    prompt_tokens: int
    transferred: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the proxy's KV canary found: how many pairs answer as their decode node does alone."""

    same: int
    not_judged: tuple[str, ...]
    """Of every pair of which it could not find out, why."""


async def compare(plan: Plan) -> Comparison | None:
    """Wait for the proxy's verdict on every pair; None when its canary is off.

    To be awaited before `prove`: the canary's questions are counted by the nodes, too. Raises KVNotMovedError when a
    decode node reads KV wrong.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _COMPARED_WITHIN_S
    pairs = sum(prefill is not decode for prefill in plan.of(Role.PREFILL) for decode in plan.of(Role.DECODE))
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        while True:
            told = (await client.get(f"{plan.proxy_url}/health")).json().get("canary")
            if told is None:
                return None
            if told["differs"]:
                raise KVNotMovedError(
                    f"KV moves, but other answers come of it: {'; '.join(_pair(pair) for pair in told['differs'])}",
                    "Do both nodes have the same weights and the same model settings? Compare their command lines in "
                    f"{plan.run_dir}",
                )
            left = pairs - told["same"] - len(told["not_judged"])
            if left <= 0 or loop.time() > deadline:
                no_verdict = [f"{left} of {pairs} pairs: no verdict in {_COMPARED_WITHIN_S:.0f} s"] * (left > 0)
                return Comparison(told["same"], (*(_pair(pair) for pair in told["not_judged"]), *no_verdict))
            await asyncio.sleep(0.2)


def _pair(told: Mapping[str, str]) -> str:
    return f"{told['prefill']} to {told['decode']}: {told['problem']}"


async def answer(plan: Plan, show: Callable[[str], None]) -> None:
    """Without a connector there is nothing to prove: one question. Raises LauncherError when no answer comes."""
    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        await _ask(client, plan, QUESTION.format(1), show)


async def prove(plan: Plan, show: Callable[[str], None]) -> Proof:
    """Ask as many questions as it takes to use every node once; the first answer goes to `show` as it comes.

    Raises KVNotMovedError when an answer came but its prompt's KV did not, LauncherError when no answer came.
    """
    if plan.connector == "MooncakeStoreConnector" and plan.services:
        return await _prove_store(plan, show)
    rounds = max(len(plan.of(role)) for role in Role)
    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        before = await _counters(client, plan)
        prompt_tokens = 0
        for number in range(rounds):
            prompt_tokens += await _ask_a_pair(
                client, plan, QUESTION.format(number + 1), show if number == 0 else _ignore
            )
        found = await _counted(client, plan, before, prompt_tokens)
    found.hand_offs, found.prompt_tokens = rounds, prompt_tokens
    if not found.is_whole and plan.connector != "MooncakeStoreConnector":
        raise KVNotMovedError(
            f"the pair answers, but only {found.transferred:.0f} of {prompt_tokens} prompt tokens came over the KV "
            f"connector; the decode nodes computed {found.computed:.0f} again",
            f"Look for transfer errors in the logs in {plan.run_dir}",
        )
    return Proof(prompt_tokens, int(found.transferred))


async def _prove_store(plan: Plan, show: Callable[[str], None]) -> Proof:
    """Through a store delivery is best effort: some tokens of one of a few long prompts must come."""
    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        for number in range(_STORE_TRIES):
            before = await _counters(client, plan)
            question = f"{number} " + QUESTION.format(number + 1) * _STORED_LENGTH
            tokens = await _ask(client, plan, question, show if number == 0 else _ignore)
            found = await _counted(client, plan, before, tokens)
            if found.is_moving:
                return Proof(tokens, int(found.transferred))
    raise KVNotMovedError(
        f"the pair answers, but no prompt token of {_STORE_TRIES} long prompts came out of the store",
        f"Look for store errors in the logs in {plan.run_dir}",
    )


async def _ask_a_pair(client: httpx.AsyncClient, plan: Plan, question: str, show: Callable[[str], None]) -> int:
    """Make the question as long as the proxy wants a prompt to be before it hands it over (`--min-prefill-tokens`,
    `--split`).
    """
    for longer in range(_LONGER_TRIES):
        try:
            return await _ask(client, plan, question, show)
        except _TooShortError:
            question = f"{question} {question} {question} {question}"
        except _RefusedError:
            if not longer:
                raise
            break  # the model takes no longer one
    hint = "Lower its --min-prefill-tokens, or leave --split out"
    raise KVNotMovedError("the proxy hands over no prompt, however long", hint)


async def _ask(client: httpx.AsyncClient, plan: Plan, question: str, show: Callable[[str], None]) -> int:
    """The prompt's tokens, as the answer's usage gives them."""
    body = {
        "model": plan.served_model_name,
        "prompt": question,
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", f"{plan.proxy_url}/v1/completions", json=body, headers=key(plan)) as answer:
        if answer.status_code != httpx.codes.OK:
            text = (await answer.aread()).decode("utf-8", "replace")
            kind = _RefusedError if answer.status_code == httpx.codes.BAD_REQUEST else LauncherError
            raise kind(f"the first request failed with {answer.status_code}: {text}", f"Logs: {plan.run_dir}")
        if any(reason in answer.headers.get("x-pd-path", "") for reason in ("short-prompt", "faster-alone")):
            raise _TooShortError
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise LauncherError(f"the first request failed: {event['error'].get('message')}")
            for choice in event["choices"]:
                show(choice["text"])
            if event.get("usage"):
                return int(event["usage"]["prompt_tokens"])
    raise LauncherError("the first answer ended without its usage", f"Logs: {plan.run_dir}")


async def _counted(client: httpx.AsyncClient, plan: Plan, before: Gauges, expected: int) -> Transfer:
    """What the decode nodes counted since `before`. A node publishes its counters a moment after its answer.

    A prompt that one of them has computed for another is counted twice.
    """
    twice = any(node.role is NodeRole.BOTH for node in plan.nodes)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _COUNTED_WITHIN_S
    while True:
        now = await _counters(client, plan)
        if now.prompt_tokens - before.prompt_tokens >= expected * (1 + twice) or loop.time() > deadline:
            return Transfer(computed=now.computed - before.computed, transferred=now.transferred - before.transferred)
        await asyncio.sleep(0.2)


async def _counters(client: httpx.AsyncClient, plan: Plan) -> Gauges:
    """The prompt tokens of all decode nodes, by where their KV came from."""
    urls = [f"{node.url}/metrics" for node in plan.of(Role.DECODE)]
    answers = await asyncio.gather(*(client.get(url) for url in urls))
    found = [metrics.gauges(answer.text) for answer in answers]
    return Gauges(
        transferred=sum(each.transferred for each in found),
        computed=sum(each.computed for each in found),
        cached=sum(each.cached for each in found),
    )


def key(plan: Plan) -> dict[str, str]:
    """The proxy takes its clients' keys from the environment, which it has from us."""
    keys = plan.proxy.inherited.get("PD_PROXY_API_KEYS", "").split(",")
    return {"Authorization": f"Bearer {keys[0].strip()}"} if keys[0].strip() else {}


def node_key(plan: Plan) -> dict[str, str]:
    """... and the nodes' own."""
    given = plan.proxy.inherited.get("PD_NODE_API_KEY")
    return {"Authorization": f"Bearer {given}"} if given else {}


def _ignore(_: str) -> None:
    return
