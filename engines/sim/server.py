"""The routes of a simulated node."""

import asyncio
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import httpx
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..base import JSONObject, NodeRole
from ..openai.errors import error_body
from ..vllm import bodies, versions
from . import tokens
from .answers import DONE, Choice, Envelope, sse
from .dialects import Dialect, as_chat, events, opening
from .dialects import answer as in_dialect
from .dialects import error as dialect_error
from .faults import MESSAGE, Faults, Kind
from .kv import BLOCK_TOKENS, TOTAL_BLOCKS, KVCache
from .prefixes import PrefixCache
from .request import RefusedError, SchemaError, Wanted, for_choice, parse
from .timing import EngineLoop, Speeds
from .transfer import TransferError, pull

REMEMBERED_REQUESTS = 64
_INVALID = "invalid_request_error"
_MOONCAKE_KEYS = {"transfer_id", "remote_engine_id", "remote_bootstrap_addr"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line and the environment said."""

    names: tuple[str, ...]
    """The model's; the first is the one that answers give."""
    role: NodeRole | None
    max_model_len: int
    load_failure_policy: str
    transfer_timeout_s: float
    address: tuple[str, int]
    bootstrap_port: int
    """Where decode nodes come for KV, too."""
    ranks: int = 1
    is_nixl: bool = False
    version: str = "sim"
    layout: Mapping[str, str] = field(default_factory=dict)
    """Of the KV cache, as vLLM tells it."""
    speeds: Speeds | None = None
    """None: it takes no time, and has room for all."""

    @property
    def model(self) -> str:
        return self.names[0]


class Counters:
    """vLLM's own series, those a proxy or a launcher reads."""

    def __init__(self, model: str, kv: KVCache, layout: Mapping[str, str], waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        if layout:
            info = Gauge("vllm:cache_config_info", "Of the cache.", list(layout), registry=self.registry)
            info.labels(**layout).set(1)
        by_source = Counter(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source.", ["model_name", "source"], registry=self.registry
        )
        self.computed = by_source.labels(model, "local_compute")
        self.transferred = by_source.labels(model, "external_kv_transfer")
        self.cached = by_source.labels(model, "local_cache_hit")
        self.generated = Counter(
            "vllm:generation_tokens", "Tokens generated.", ["model_name"], registry=self.registry
        ).labels(model)
        usage = Gauge("vllm:kv_cache_usage_perc", "KV-cache usage.", ["model_name"], registry=self.registry)
        usage.labels(model).set_function(kv.usage)
        self.running = Gauge(
            "vllm:num_requests_running", "Requests running.", ["model_name"], registry=self.registry
        ).labels(model)
        queue = Gauge("vllm:num_requests_waiting", "Requests waiting.", ["model_name"], registry=self.registry)
        queue.labels(model).set_function(waiting)
        self.queue_s, self.prefill_s, self.decode_s = (
            Histogram(
                f"vllm:request_{phase}_time_seconds", f"Time in {phase}.", ["model_name"], registry=self.registry
            ).labels(model)
            for phase in ("queue", "prefill", "decode")
        )
        """A request's phases. As vLLM counts it, one that waits for KV is in the queue."""


@dataclass
class SimNode:
    """One node's life. A new `engine_id` with every start, as vLLM makes one."""

    settings: Settings
    stop_listening: Callable[[float], None]
    engine_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    faults: Faults = field(default_factory=Faults)
    chunks: int = 0
    """Sent in all streams so far."""
    received: deque[JSONObject] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))

    def __post_init__(self) -> None:
        layout, speeds = self.settings.layout, self.settings.speeds
        block_tokens = int(layout.get("block_size", BLOCK_TOKENS))
        total_blocks = int(layout.get("num_gpu_blocks", TOTAL_BLOCKS))
        self.kv = KVCache(self.settings.transfer_timeout_s, block_tokens, total_blocks, self._freed)
        self.counters = Counters(self.settings.model, self.kv, layout, self._waiting)
        self.loops: list[EngineLoop] = []
        if speeds is not None:
            most = block_tokens * total_blocks
            self.loops = [EngineLoop(speeds, self.kv.room, most) for _ in range(self.settings.ranks)]
        caches = layout.get("enable_prefix_caching") != "False"
        self.prefixes = [PrefixCache(block_tokens, total_blocks) for _ in range(self.settings.ranks * caches)]
        self.client = httpx.AsyncClient(trust_env=False)
        self.background: set[asyncio.Task[Any]] = set()
        self.stored: dict[str, JSONObject] = {}
        """Responses, as with VLLM_ENABLE_RESPONSES_API_STORE=1."""

    def _waiting(self) -> int:
        return sum(loop.waiting for loop in self.loops)

    def _freed(self) -> None:
        for loop in self.loops:
            loop.let_in()

    # -- routes

    async def generate(self, request: Request, *, chat: bool, dialect: Dialect | None = None) -> Response:
        kind = self.faults.take()
        raw = await request.body()
        self._remember(request, raw)
        if kind == "status":
            if bodies.is_released_by_refusal(self.faults.status, "InternalServerError"):
                self._release(_transfer_params(raw))
            return _error(MESSAGE, "InternalServerError", self.faults.status, headers=self.faults.headers)
        if kind == "drop":
            request.scope["sim.transport"].abort()
        if kind in ("hang", "drop"):
            await _until_gone(request)
            if kind == "hang":  # the engine had it, and aborts it
                self._release(_transfer_params(raw))
            return Response(status_code=499)
        try:
            body = orjson.loads(raw)
            wanted = self._wanted(body, chat=chat, dialect=dialect)
        except orjson.JSONDecodeError as exc:
            return _error(f"1 validation error:\n  JSON decode error: {exc}", "Bad Request", 400)
        except SchemaError as exc:
            return _error(f"1 validation error:\n  {exc}", "Bad Request", 400)
        except RefusedError as exc:
            return self._refused(request, body, exc, dialect)
        wanted = replace(wanted, rank=self._rank(request))
        self._die_of_the_wrong_role(wanted.kv)
        if kind == "finish-error":  # such a request holds no KV
            wanted = replace(wanted, kv={})
        if dialect is None:
            return await self._answer(request, wanted, kind)
        return await self._answer_in(dialect, request, wanted, kind, stored=body.get("store") is not False)

    async def _answer_in(
        self, dialect: Dialect, request: Request, wanted: Wanted, kind: Kind | None, *, stored: bool
    ) -> Response:
        answer = await self._answer(request, replace(wanted, stream=False), kind)
        if answer.status_code != 200:
            return answer
        if answer.media_type == "text/event-stream":  # an error, in place of the first event
            return _error_in_dialect(dialect, wanted.stream)
        whole = in_dialect(dialect, orjson.loads(answer.body))
        if dialect == "responses" and stored:
            self.stored[whole["id"]] = whole
        return _events(list(events(dialect, whole))) if wanted.stream else JSONResponse(whole)

    def _refused(self, request: Request, body: Any, error: RefusedError, dialect: Dialect | None) -> Response:
        if error.late and body.get("stream"):
            if dialect == "responses":
                return StreamingResponse(self._opened_and_broken(request), media_type="text/event-stream")
            return _events([sse(error_body(str(error), "BadRequestError", error.status, error.param)), DONE])
        self._release(body.get("kv_transfer_params") or {})
        return _error(str(error), error.kind, error.status, error.param)

    @staticmethod
    async def _opened_and_broken(request: Request) -> AsyncIterator[bytes]:
        """VLLM begins this stream before its engine has the request, and an error then breaks the connection."""
        yield opening()
        request.scope["sim.transport"].close()
        await asyncio.Event().wait()

    def _wanted(self, body: Any, *, chat: bool, dialect: Dialect | None) -> Wanted:
        """Raises SchemaError, RefusedError."""
        spoken = body if dialect is None else as_chat(dialect, body)
        wanted = parse(spoken, chat=chat, names=self.settings.names, max_model_len=self.settings.max_model_len)
        previous = body.get("previous_response_id")
        if dialect == "responses" and previous not in (None, *self.stored):
            raise RefusedError(unknown(previous), "response_id", 404, _INVALID)
        return wanted

    async def told_again(self, response: JSONObject) -> AsyncIterator[bytes]:
        """The events of a stored response, as of one that is made in the background."""
        with self.counters.running.track_inprogress():
            for event in events("responses", response):
                yield event
                await asyncio.sleep(self.faults.itl_s)

    async def bootstrap_pull(self, request: Request) -> Response:
        """Stands in for the ZMQ side channel and the transfer engine."""
        wanted = await request.json()
        prompt = await self.kv.pull(f"{wanted['engine_id']} {wanted['transfer_id']}")
        if prompt is None:
            return Response(status_code=404)
        return JSONResponse({"prompt_token_ids": prompt})

    def query(self) -> JSONObject:
        worker = {"0": {"0": f"tcp://127.0.0.1:{self.settings.bootstrap_port}"}}
        return {str(n): {"engine_id": self.engine_of(n), "worker_addr": worker} for n in range(self.settings.ranks)}

    def engine_of(self, rank: int) -> str:
        """VLLM adds the rank to the id when there are several."""
        return self.engine_id if self.settings.ranks == 1 else f"{self.engine_id}_dp{rank}"

    def state(self) -> JSONObject:
        return {
            "engine_id": self.engine_id,
            "held": sorted(self.kv.held),
            "expired": self.kv.expired,
            "waiting_pulls": self.kv.waiting_pulls,
            "chunks": self.chunks,
            "leaked_blocks": self.kv.leaked_blocks,
            "faults": self.faults.model_dump(),
            "received": list(self.received),
        }

    def control(self, settings: JSONObject) -> JSONObject:
        """Replace the faults; fields not given go back to their defaults, latency included."""
        self.faults = Faults(**settings)
        if self.faults.refuse_s:
            self.stop_listening(self.faults.refuse_s)
        return self.faults.model_dump()

    # -- one request

    async def _answer(self, request: Request, wanted: Wanted, kind: Kind | None) -> Response:
        stack = AsyncExitStack()
        try:
            prompts = await _unless_gone(request, self._admit(wanted, stack))
            if prompts is None:
                return Response(status_code=499)
            choices = self._choices(wanted, prompts)
            envelope = Envelope(_request_id(request, wanted), int(time.time()), self.settings.model, wanted)  # noqa: TID251  vLLM's `created`
            if kind == "error-first" or (kind == "finish-error" and wanted.stream):
                return _events([sse(_failure()), DONE])
            if wanted.stream:
                running = stack.pop_all()
                stream = self._stream(request, wanted, choices, envelope, kind)
                return StreamingResponse(_closing(stream, running), media_type="text/event-stream")
            body = await _unless_gone(request, self._whole(wanted, choices, envelope))
            if body is None:
                self._spurious_pull(wanted.kv)
                return Response(status_code=499)
            if kind == "finish-error":
                body["choices"][0]["finish_reason"] = "error"
            self._tell_where_kv_lies(wanted, body)
            return JSONResponse(body)
        except TransferError as exc:
            return _load_failed(wanted, exc)
        finally:
            await stack.aclose()

    async def _admit(self, wanted: Wanted, stack: AsyncExitStack) -> tuple[tuple[int, ...], ...]:
        """Count the request as running, and get its prompts' KV: by transfer, or by computing it."""
        loop = self.loops[wanted.rank] if self.loops else None
        arrived = time.monotonic()
        if loop is not None:
            await stack.enter_async_context(loop.place(sum(map(len, wanted.prompts))))
            wanted.sequence.append(stack.enter_context(loop.sequence()))
        stack.enter_context(self.counters.running.track_inprogress())
        for ids in wanted.prompts:
            stack.enter_context(self.kv.running(len(ids)))
        prompts = await self._transferred(wanted) if wanted.kv.get("do_remote_prefill") else None
        if prompts is not None:
            if loop is not None:
                await loop.hand_off(sum(map(len, prompts)))
                began = time.monotonic()
                await wanted.sequence[0].token(wanted.sampling.max_tokens)
                self._note_phases(stack, arrived, began)
            self.counters.transferred.inc(sum(map(len, prompts)))
            return prompts
        await asyncio.sleep(self.faults.ttft_s)
        if loop is None:
            self._compute_all(wanted)
        else:
            began = arrived

            def begin() -> int:
                nonlocal began
                began = time.monotonic()
                return self._compute_all(wanted)

            await loop.prefill(begin)
            self._note_phases(stack, arrived, began)
        self.counters.cached.inc(sum(wanted.found))
        self.counters.computed.inc(sum(map(len, wanted.prompts)) - sum(wanted.found))
        return wanted.prompts

    def _note_phases(self, stack: AsyncExitStack, arrived: float, began: float) -> None:
        """The last one when it ends."""
        first_token = time.monotonic()
        self.counters.queue_s.observe(began - arrived)
        self.counters.prefill_s.observe(first_token - began)
        stack.callback(lambda: self.counters.decode_s.observe(time.monotonic() - first_token))

    def _compute_all(self, wanted: Wanted) -> int:
        """How many tokens had to be computed."""
        wanted.found[:] = map(self._compute, wanted.prompts, repeat(wanted.rank))
        return sum(map(len, wanted.prompts)) - sum(wanted.found)

    def _compute(self, prompt: tuple[int, ...], rank: int) -> int:
        """How many of its tokens were cached."""
        return self.prefixes[rank].compute(prompt) if self.prefixes else 0

    async def _transferred(self, wanted: Wanted) -> tuple[tuple[int, ...], ...] | None:
        """The KV each sequence asked for. None: it did not come, and the policy is to compute it here.

        What is generated goes on from what *came*: nothing checks that KV and prompt belong together.
        """
        needed = {"remote_engine_id", "remote_host"} if self.settings.is_nixl else _MOONCAKE_KEYS
        if not needed <= wanted.kv.keys():
            self.kv.leak(sum(map(len, wanted.prompts)))
            await asyncio.Event().wait()
        try:
            self._lose_transfer_if_told()
            # shielded: what is aborted meanwhile is pulled all the same (mooncake_connector.py, `request_finished`)
            came = tuple([await asyncio.shield(self._pull(wanted.kv)) for _ in wanted.prompts])
            return tuple(prompt[::-1] for prompt in came) if self.faults.garble_transfers else came
        except TransferError:
            if self.settings.load_failure_policy == "fail":
                raise
            return None

    def _lose_transfer_if_told(self) -> None:
        if self.faults.lose_transfers:
            raise TransferError("lost, as told")

    def _rank(self, request: Request) -> int:
        """The rank the request asks for; any, if it asks for none."""
        asked = request.headers.get("x-data-parallel-rank", "")
        return int(asked) if asked.isdigit() else len(self.received) % self.settings.ranks

    def _choices(self, wanted: Wanted, prompts: tuple[tuple[int, ...], ...]) -> list[Choice]:
        return [
            Choice(number * wanted.n + sample, ids, tokens.decode(ids) if wanted.echo else "")
            for number, ids in enumerate(prompts)
            for sample in range(wanted.n)
        ]

    async def _steps(self, wanted: Wanted, choice: Choice) -> AsyncIterator[tuple[str, list[int]]]:
        """(text, ids) of each token; the choice's finish reason is set with the last."""
        sampling = for_choice(wanted.sampling, choice.index % wanted.n)
        for token, reason in tokens.generate(choice.prompt, sampling):
            shown = len(choice.text)
            choice.ids.append(token)
            self.counters.generated.inc()
            choice.text += tokens.token_text(token)
            choice.finish_reason = reason
            if reason == "stop" and token in sampling.stop_token_ids:
                choice.stop_reason = token
            self._cut_at_stop_string(wanted, choice)
            yield choice.text[shown:], [token]
            if choice.finish_reason is not None:
                self._finished(wanted, choice, wanted.rank)
                return
            await asyncio.sleep(self.faults.itl_s)
            for sequence in wanted.sequence:
                await sequence.token(sampling.max_tokens - len(choice.ids))

    def _cut_at_stop_string(self, wanted: Wanted, choice: Choice) -> None:
        for stop in wanted.stop:
            if stop in choice.text:
                choice.text = choice.text[: choice.text.index(stop)]
                choice.finish_reason, choice.stop_reason = "stop", stop

    def _finished(self, wanted: Wanted, choice: Choice, rank: int) -> None:
        """A producer keeps KV for a request that ended by length, and for no other."""
        transfer_id = wanted.kv.get("transfer_id") or (wanted.own_id if self.settings.is_nixl else None)
        if wanted.kv.get("do_remote_decode") and transfer_id and choice.finish_reason == "length":
            self.kv.hold(f"{self.engine_of(rank)} {transfer_id}", choice.prompt)

    def _tell_where_kv_lies(self, wanted: Wanted, body: JSONObject) -> None:
        """NixlConnector's prefill node answers what the decode node must be told; MooncakeConnector's does not."""
        if self.settings.is_nixl and wanted.kv.get("do_remote_decode"):
            host, port = self.settings.address
            body["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self.engine_id,
                "remote_block_ids": [[1, 2, 3]],
                "remote_request_id": wanted.own_id,
                "remote_host": host,
                "remote_port": port,
            }

    async def _whole(self, wanted: Wanted, choices: list[Choice], envelope: Envelope) -> JSONObject:
        for choice in choices:
            async for _ in self._steps(wanted, choice):
                pass
        return envelope.body(choices, self._cached(wanted))

    async def _stream(
        self, request: Request, wanted: Wanted, choices: list[Choice], envelope: Envelope, kind: Kind | None
    ) -> AsyncIterator[bytes]:
        sent = 0
        for choice in choices:
            if wanted.chat:
                yield envelope.event(choice, "", [], first=True)
                if wanted.echo:  # its parts are no string, and vLLM 0.32 fails on it
                    yield sse(error_body("1 validation error for DeltaMessage", "BadRequestError", 400)) + DONE
                    return
            async for text, ids in self._steps(wanted, choice):
                if kind == "error-after" and sent >= self.faults.chunks:  # as vLLM does when its engine dies
                    yield sse(_failure()) + DONE
                    return
                await self._break_off(request, kind, sent)
                first = not wanted.chat and len(choice.ids) == 1
                yield envelope.event(choice, choice.prefix + text if first else text, ids, first=first)
                sent += 1
                self.chunks += 1
        if wanted.include_usage:
            yield envelope.usage_event(choices, self._cached(wanted))
        yield DONE

    async def _break_off(self, request: Request, kind: Kind | None, sent: int) -> None:
        if kind is None or sent < self.faults.chunks:
            return
        if kind == "exit-after":
            os._exit(1)
        if kind == "drop-after":
            request.scope["sim.transport"].close()  # what was written still goes out, then an end without an end
        if kind in ("drop-after", "hang-after"):
            await asyncio.Event().wait()

    def _cached(self, wanted: Wanted) -> int:
        """VLLM counts every transferred token as cached, unless it is told the prefill node's number."""
        if not wanted.kv.get("do_remote_prefill"):
            return sum(wanted.found)
        told = wanted.kv.get("remote_prefill_cached_tokens")
        return sum(map(len, wanted.prompts)) if told is None else int(told)

    # -- what the engine does besides answering

    def _die_of_the_wrong_role(self, kv: JSONObject) -> None:
        """An assertion in vLLM's scheduler: the engine core dies, and the API server with it."""
        wrong = {NodeRole.PREFILL: "do_remote_prefill", NodeRole.DECODE: "do_remote_decode"}
        if kv.get(wrong.get(self.settings.role)):  # type: ignore[arg-type]
            print("AssertionError: EngineCore encountered a fatal error", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)

    def _release(self, kv: JSONObject) -> None:
        """A rejected decode pulls nothing and so frees the prefill node's KV."""
        if kv.get("do_remote_prefill") and ("remote_bootstrap_addr" in kv or "remote_host" in kv):
            if not versions.survives_refusals(self.settings.version):
                print("AssertionError: assert req_id in self.requests", file=sys.stderr, flush=True)  # noqa: T201
                os._exit(1)
            self._pull(kv)

    def _spurious_pull(self, kv: JSONObject) -> None:
        """A non-streaming request dropped after its KV came pulls again, for an id the prefill node has forgotten."""
        self._release(kv)

    def _pull(self, kv: JSONObject) -> "asyncio.Task[tuple[int, ...]]":
        task = asyncio.create_task(pull(self.client, kv, self.settings.transfer_timeout_s))
        self.background.add(task)
        task.add_done_callback(self._pulled)
        return task

    def _pulled(self, task: "asyncio.Task[tuple[int, ...]]") -> None:
        self.background.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may wait for it

    def _remember(self, request: Request, raw: bytes) -> None:
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            body = raw.decode("utf-8", "replace")
        self.received.append({"path": request.url.path, "headers": dict(request.headers), "body": body})


def make_app(node: SimNode) -> FastAPI:  # noqa: C901  a list of routes
    """The API server of a node."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for task in node.background:
            task.cancel()
        await node.client.aclose()

    app = FastAPI(title="pd-launch engine simulator", lifespan=lifespan)
    cards: list[JSONObject] = [
        {
            "id": name,
            "object": "model",
            "owned_by": "pd-launch-sim",
            "root": node.settings.model,
            "parent": None,
            "max_model_len": node.settings.max_model_len,
        }
        for name in node.settings.names
    ]

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/version")
    async def version() -> JSONObject:
        return {"version": node.settings.version}

    @app.get("/v1/models")
    async def models() -> JSONObject:
        return {"object": "list", "data": cards}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(node.counters.registry), media_type="text/plain")

    @app.post("/tokenize")
    async def tokenize(body: dict[str, Any]) -> JSONObject:
        ids = tokens.render_chat(body["messages"], body) if "messages" in body else tokens.encode(body["prompt"])
        return {"count": len(ids), "max_model_len": node.settings.max_model_len, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(body: dict[str, Any]) -> JSONObject:
        return {"prompt": tokens.decode(body["tokens"])}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await node.generate(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await node.generate(request, chat=True)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await node.generate(request, chat=True, dialect="responses")

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str, *, stream: bool = False) -> Response:
        known = node.stored.get(response_id)
        if known is None:
            return _error(unknown(response_id), _INVALID, 404, "response_id")
        if stream:
            return StreamingResponse(node.told_again(known), media_type="text/event-stream")
        return JSONResponse(known)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        if response_id not in node.stored:
            return _error(unknown(response_id), _INVALID, 404, "response_id")
        return _error("Cannot cancel a synchronous response.", _INVALID, 400, "response_id")

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await node.generate(request, chat=True, dialect="messages")

    @app.post("/sim/pull")
    async def pull_kv(request: Request) -> Response:
        return await node.bootstrap_pull(request)

    @app.get("/sim")
    async def state() -> JSONObject:
        return node.state()

    @app.post("/sim")
    async def control(settings: dict[str, Any]) -> JSONObject:
        return node.control(settings)

    return app


def make_bootstrap_app(node: SimNode) -> FastAPI:
    """The bootstrap server of a prefill node."""
    app = FastAPI(title="pd-launch bootstrap simulator")

    @app.get("/query")
    async def query() -> JSONObject:
        return node.query()

    @app.post("/sim/pull")
    async def pull_kv(request: Request) -> Response:
        return await node.bootstrap_pull(request)

    return app


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, or None when the client leaves first (the work is then cancelled)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _closing(stream: AsyncIterator[bytes], stack: AsyncExitStack) -> AsyncIterator[bytes]:
    async with stack:
        async for chunk in stream:
            yield chunk


def _transfer_params(raw: bytes) -> JSONObject:
    try:
        return orjson.loads(raw).get("kv_transfer_params") or {}
    except (orjson.JSONDecodeError, AttributeError):
        return {}


def unknown(response_id: str) -> str:
    return f"Response with id '{response_id}' not found."


def _error_in_dialect(dialect: Dialect, stream: bool) -> Response:  # noqa: FBT001
    return _events([dialect_error(dialect, MESSAGE)]) if stream else _error(MESSAGE, "InternalServerError", 500)


def _load_failed(wanted: Wanted, exc: TransferError) -> Response:
    """VLLM's `kv_load_failure_policy: fail`: a 500, or in a stream a 200 whose first event is an error."""
    if wanted.stream:
        return _events([sse(error_body("Internal server error", "InternalServerError", 500)), DONE])
    return _error(f"Internal server error: {exc}", "InternalServerError", 500)


def _events(events: list[bytes]) -> Response:
    return Response(b"".join(events), media_type="text/event-stream")


def _error(
    message: str, kind: str, status: int, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    return JSONResponse(error_body(message, kind, status, param), status, headers)


def _failure() -> JSONObject:
    return error_body(MESSAGE, "InternalServerError", 500)


def _request_id(request: Request, wanted: Wanted) -> str:
    given = request.headers.get("x-request-id") or uuid.uuid4().hex
    return f"chatcmpl-{given}" if wanted.chat else f"cmpl-{given}"
