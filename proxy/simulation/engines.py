"""Engines in virtual time. Between two events all running sequences make tokens at one rate, so no step is played."""

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engines.performance import Constants

At = Callable[[float, Callable[[], None]], None]
"""Do something at a time."""


@dataclass(slots=True)
class Job:
    """One request, with what becomes of it. Times in seconds."""

    number: int
    due: float
    tokens: int
    output: int
    keys: tuple[int, ...]
    """Of its prompt's pieces, chained."""
    piece_tokens: float
    first: float = 0.0
    ended: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


class Cache:
    """Prompts that a node has computed, until others need the room: used longest ago, gone first."""

    def __init__(self, tokens: int) -> None:
        self._room = tokens
        self._pieces: OrderedDict[int, float] = OrderedDict()
        self._tokens = 0.0

    def take(self, job: Job) -> float:
        """How many tokens of the prompt are there; all of it is, afterwards. The last token is computed always."""
        known = 0
        for key in job.keys:
            if key not in self._pieces:
                break
            known += 1
        for key in reversed(job.keys):
            if key in self._pieces:
                self._pieces.move_to_end(key)
            else:
                self._pieces[key] = job.piece_tokens
                self._tokens += job.piece_tokens
        while self._tokens > self._room and self._pieces:
            self._tokens -= self._pieces.popitem(last=False)[1]
        return min(known * job.piece_tokens, job.tokens - 1)


class PrefillEngine:
    """Prompts in their order, in a step as many as it has tokens for; those of a step end together."""

    def __init__(self, constants: Constants, at: At) -> None:
        self._constants = constants
        self._at = at
        self._cache = Cache(constants.kv_tokens)
        self._queue: deque[tuple[float, Job, Callable[[float], None]]] = deque()
        self._is_busy = False
        self.busy_s = 0.0

    def prefill(self, job: Job, now: float, done: Callable[[float], None]) -> None:
        """`done` gets how many tokens were cached."""
        self._queue.append((now, job, done))
        if not self._is_busy:
            self._next(now)

    def _next(self, now: float) -> None:
        self._is_busy = bool(self._queue)
        step = list[tuple[Callable[[float], None], float]]()
        begun, seconds, left = list[Job](), 0.0, float(self._constants.step_tokens)
        while self._queue and (not step or self._queue[0][1].tokens <= left):
            came, job, done = self._queue.popleft()
            cached = self._cache.take(job)
            seconds += self._constants.prefill_s(job.tokens, cached)
            left -= job.tokens - cached
            job.stages["prefill queue"] = now - came
            begun.append(job)
            step.append((done, cached))
        for job in begun:
            job.stages["prefill"] = seconds
        self.busy_s += seconds

        def end() -> None:
            for done, cached in step:
                done(cached)
            self._next(now + seconds)

        if step:
            self._at(now + seconds, end)


@dataclass(slots=True)
class _Waiting:
    came: float
    job: Job
    done: Callable[[], None]
    uncached: float
    """To be computed here, first; 0 for KV that came."""
    cached: float = 0.0


class DecodeEngine:
    """All its sequences make a token in each step. An ordinary node computes prompts between, a share in each step."""

    def __init__(self, constants: Constants, at: At, *, caches: bool) -> None:
        self._constants = constants
        self._at = at
        self._cache = Cache(constants.kv_tokens) if caches else None
        self._waiting: deque[_Waiting] = deque()
        self._prefills: deque[_Waiting] = deque()
        self._is_prefilling = False
        self._steps = 0.0
        """Steps of decoding made so far."""
        self._since = 0.0
        self._rate = 0.0
        """Steps a second since then."""
        self._live = 0.0
        """Tokens of running sequences, as if none had generated any."""
        self._begun = 0.0
        """The sum of the step numbers at which they began."""
        self._running: list[tuple[float, int, _Waiting]] = []
        self._decoding = 0
        self._held = 0.0
        """Tokens that running sequences will have in the end."""
        self._order = itertools.count()
        self._version = 0
        self.busy_s = 0.0

    def answer(self, job: Job, now: float, done: Callable[[], None], *, has_kv: bool) -> None:
        """Generate all of an answer. `has_kv`: the prompt's came; else it is computed first."""
        waiting = _Waiting(now, job, done, 0.0)
        if not has_kv:
            waiting.cached = self._cache.take(job) if self._cache else 0.0
            waiting.uncached = job.tokens - waiting.cached
        self._waiting.append(waiting)
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """Something has changed: what was made until now is made, who has room is let in, and the next end is found."""
        self._catch_up(now)
        self._end_finished(now)
        self._let_in(now)
        self._begin_prefill(now)
        self._plan(now)

    def _catch_up(self, now: float) -> None:
        if self._decoding or self._is_prefilling:
            self.busy_s += now - self._since
        self._steps += self._rate * (now - self._since)
        self._since = now

    def _end_finished(self, now: float) -> None:
        while self._running and self._running[0][0] <= self._steps + 1e-6:
            _, _, one = heapq.heappop(self._running)
            self._decoding -= 1
            job = one.job
            self._live -= job.tokens
            self._begun -= job.stages.pop("began at step")
            self._held -= job.tokens + job.output
            job.ended = now
            job.stages["decode"] = now - job.first
            one.done()

    def _let_in(self, now: float) -> None:
        while self._waiting:
            one = self._waiting[0]
            needed = one.job.tokens + one.job.output
            running = self._decoding + len(self._prefills) + self._is_prefilling
            if running >= self._constants.sequences or (running and self._held + needed > self._constants.kv_tokens):
                return
            self._waiting.popleft()
            self._held += needed
            queued = now - one.came
            if one.uncached:
                one.job.stages["queue"] = queued
                self._prefills.append(one)
            else:
                one.job.stages["decode queue"] = queued
                self._begin_decoding(one, now)

    def _begin_decoding(self, one: _Waiting, now: float) -> None:
        """Its first token is that of the next step, or of the one that has computed its prompt."""
        job = one.job
        live = self._live + self._steps * self._decoding - self._begun
        job.first = now if one.uncached else now + self._constants.step_s(self._decoding + 1, live + job.tokens)
        self._decoding += 1
        self._live += job.tokens
        self._begun += self._steps
        job.stages["began at step"] = self._steps
        left = job.output - 1 if one.uncached else job.output
        heapq.heappush(self._running, (self._steps + left, next(self._order), one))

    def _begin_prefill(self, now: float) -> None:
        if self._is_prefilling or not self._prefills:
            return
        one = self._prefills.popleft()
        self._is_prefilling = True
        a_step = self._step_s()
        room = max(self._constants.step_tokens - self._decoding, 1)
        steps = max(-(-one.uncached // room), 1)
        own = self._constants.prefill_s(one.job.tokens, one.cached)
        seconds = own + (steps * a_step if self._decoding else 0.0)
        self._rate = steps / seconds if self._decoding else 0.0
        one.job.stages["queue"] = now - one.came
        one.job.stages["prefill"] = seconds

        def end() -> None:
            self._catch_up(now + seconds)
            self._is_prefilling = False
            self._begin_decoding(one, now + seconds)
            self._go_on(now + seconds)

        self._at(now + seconds, end)

    def _step_s(self) -> float:
        live = self._live + self._steps * self._decoding - self._begun
        return self._constants.step_s(self._decoding, live)

    def _plan(self, now: float) -> None:
        """When the next sequence ends, unless something happens before."""
        if not self._is_prefilling:
            self._rate = 1 / self._step_s() if self._decoding else 0.0
        self._version += 1
        if not self._running or not self._rate:
            return
        version, left = self._version, max(self._running[0][0] - self._steps, 0.0)

        def end() -> None:
            if version == self._version:
                self._go_on(now + left / self._rate)

        self._at(now + left / self._rate, end)
