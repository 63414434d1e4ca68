"""`pd-launch test`: from the bottom up, each stage on what the one below has proven. The first failure ends it.

1. transfer   two transfer engines alone, on the planned ports, move bytes whose hash is compared
2. nodes      every node starts and answers by itself
3. addresses  what nodes tell each other is dialled: bootstrap servers, workers' side channels; ports are the planned
4. hand-off   through both legs every pair says what its decode node says alone, which counts the tokens that came
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from engines.base import Role
from engines.known import ENGINES
from engines.symptoms.catalogue import known

from ..errors import ConfigError, KVNotMovedError, LauncherError
from ..events.events import Events
from ..events.tail import tail
from ..hosts.host import Host
from ..hosts.reserve import Reserved
from ..inspect import logs
from ..inspect.runs import RunFolder
from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import NodeProcess, Plan
from . import proof
from .supervisor import Supervisor

_BYTES = 64 * 2**20
_PROBE_S = 60
_DIAL_S = 5
_TOKENS = 16
_PROBE = "pd_transfer_probe.py"


class SelfTestError(LauncherError):
    """Which stage failed, and what the ones before it have proven."""

    exit_code = 8


@dataclass(frozen=True, slots=True)
class _Stage:
    number: int
    name: str
    failure_means: str

    def failed(self, error: LauncherError) -> SelfTestError:
        return SelfTestError(
            f"stage {self.number}, {self.name}: {error}", f"{error.hint}\n{self.failure_means}".strip()
        )


_TRANSFER = _Stage(
    1, "transfer engine", "No serving engine took part: look at addresses, firewall and Mooncake itself."
)
_NODES = _Stage(2, "nodes", "The transfer engines work by themselves: look at this node's own log.")
_ADDRESSES = _Stage(
    3, "addresses", "Every node works by itself: what it tells the others is wrong, or cannot be reached."
)
_HAND_OFF = _Stage(
    4, "hand-off", "Nodes and addresses are well: look at the KV connector's configuration on both sides."
)


async def run(config: LaunchConfig, reserved: Reserved, host: Host, folder: RunFolder, events: Events) -> None:
    """All stages; everything is down again afterwards. Raises SelfTestError at the first that fails."""
    if config.connector == "none":
        raise ConfigError("--connector none: nothing is handed over that could be tried", "`pd-launch up` tries it")
    if not ENGINES[config.engine].is_simulated:
        async with _stage(_TRANSFER), events.shown():
            with events.step("1 transfer engine: two of them, on the planned ports"):
                megabytes, seconds = _BYTES / 1e6, await _transfer(reserved.plan, reserved.facts)
        events.say(f"  {megabytes:.0f} MB arrived as they were sent, {megabytes / seconds:.0f} MB/s", "text")
    await Supervisor(config, reserved, host, folder, events).run_through(
        lambda supervisor: _upper_stages(supervisor, events)
    )
    events.say("All stages passed.", "text")


async def _upper_stages(supervisor: Supervisor, events: Events) -> None:
    async with _stage(_NODES):
        await supervisor.start_nodes()
        plan = supervisor.plan
        alone = {node.name: await _ask(plan, node) for node in plan.nodes}
        said = {node.name: alone[node.name] for node in plan.of(Role.DECODE)}
        if len(set(said.values())) != 1:
            _differ(plan, events, f"decode nodes answer one question differently: {said}", "Do they serve one model?")
    events.say(f"✓ 2 nodes: each of {', '.join(alone)} answers by itself", "text")
    async with _stage(_ADDRESSES):
        dialled = await _addresses(plan)
    events.say(f"✓ 3 addresses: reached {', '.join(dialled) or 'nothing to reach'}; ports are the planned ones", "text")
    async with _stage(_HAND_OFF):
        await supervisor.start_proxy()
        compared = await proof.compare(plan)
        result = await proof.prove(plan, lambda _: None)
    pairs = "answers are not compared (--canary-interval-s=0)"
    if compared is not None:
        of = compared.same + len(compared.not_judged)
        pairs = f"{compared.same} of {of} pairs answer as their decode node does alone"
        for pair in compared.not_judged:
            events.say(f"not compared: {pair}", "warning")
    events.say(f"✓ 4 hand-off: {result.transferred} of {result.prompt_tokens} prompt tokens moved, {pairs}", "text")


def _differ(plan: Plan, events: Events, what: str, hint: str) -> None:
    """On a CPU equal questions have equal answers. On GPUs rounding differs between sizes and batches: two tokens that
    are nearly as likely change places, and nothing is wrong. Raises KVNotMovedError.
    """
    if plan.device == "cpu":
        raise KVNotMovedError(what, hint)
    events.say(f"{what}\nRounding may explain it; text that makes no sense does not. {hint}", "warning")


@asynccontextmanager
async def _stage(stage: _Stage) -> AsyncIterator[None]:
    try:
        yield
    except LauncherError as exc:
        raise stage.failed(exc) from exc
    except (httpx.HTTPError, TimeoutError) as exc:
        raise stage.failed(LauncherError(f"nothing came back in time, or the connection broke: {exc!r}")) from exc


# -- 1: the transfer engines alone


async def _transfer(plan: Plan, facts: HostFacts) -> float:
    """Seconds for `_BYTES`, from the prefill node's place to the decode node's, which is the way KV goes."""
    prefill = plan.of(Role.PREFILL)[0]
    decode = next(node for node in plan.of(Role.DECODE) if node is not prefill)
    host = str(urlsplit(decode.url).hostname)
    program = Path(facts.plugins) / _PROBE
    log = plan.run_dir / "transfer.log"
    async with asyncio.timeout(_PROBE_S), _probe(decode, program, log, "receive", host, plan.protocol) as receiver:
        there = await _told(receiver, log)
        await _in_its_slice(decode, there["port"])
        async with _probe(
            prefill, program, log, "send", host, plan.protocol, there["session"], there["address"]
        ) as sender:
            sent = await _told(sender, log)
        await _in_its_slice(prefill, sent["port"])
        assert receiver.stdin is not None  # noqa: S101  it was asked for
        receiver.stdin.write(b"\n")
        got = await _told(receiver, log)
    if got["sha256"] != sent["sha256"]:
        raise LauncherError("the bytes that arrived are not those that were sent", f"Its log is {log}")
    return float(sent["seconds"])


@asynccontextmanager
async def _probe(
    node: NodeProcess, program: Path, log: Path, what: str, *arguments: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    host, protocol, *peer = map(str, arguments)
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            node.command[0], str(program), what, host, protocol, str(_BYTES), *peer,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            env=node.inherited | node.environment | {"TMPDIR": str(log.parent)},
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _told(probe: asyncio.subprocess.Process, log: Path) -> dict[str, Any]:
    """The next thing a probe says. Raises LauncherError with its last words when it ends instead."""
    assert probe.stdout is not None  # noqa: S101  it was asked for
    async for line in probe.stdout:
        if line.startswith(b"PROBE "):
            told: dict[str, Any] = json.loads(line.removeprefix(b"PROBE "))
            return told
    words = "\n".join(f"    {line}" for line in tail(log, 5))
    raise LauncherError(f"a transfer engine failed:\n{words}", f"Its log is {log}")


async def _in_its_slice(node: NodeProcess, port: int) -> None:
    first, last = node.seat.transfer_ports
    if not first <= port <= last:
        raise LauncherError(
            f"{node.name}: the transfer engine listens on {port}, outside its slice {first}-{last}",
            "This version does not understand the variables that name the slice (Mooncake < 0.3.11 knows others)",
        )


# -- 2: answers


async def _ask(plan: Plan, node: NodeProcess) -> str:
    """A greedy answer. Raises LauncherError."""
    body = {
        "model": plan.served_model_name,
        "prompt": proof.QUESTION.format(0),
        "max_tokens": _TOKENS,
        "temperature": 0,
    }
    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        answer = await client.post(f"{node.url}/v1/completions", json=body, headers=proof.node_key(plan))
    if not answer.is_success:
        raise LauncherError(f"{node.url} answered {answer.status_code}: {answer.text[:300]}")
    return str(answer.json()["choices"][0]["text"])


# -- 3: addresses


async def _addresses(plan: Plan) -> list[str]:
    """Dial everything that nodes tell each other; see that the transfer engines listen where they were planned to."""
    dialled = []
    async with httpx.AsyncClient(trust_env=False, timeout=_DIAL_S) as client:
        for node in plan.nodes:
            if node.bootstrap:
                known = (await client.get(f"{node.bootstrap}/query")).raise_for_status().json()
                dialled.append(node.bootstrap)
                for address in _worker_addresses(known):
                    await _dial(node.name, address)
                    dialled.append(address)
    for node in plan.nodes:
        for port in _transfer_ports_in(node.log):
            await _in_its_slice(node, port)
    return dialled


def _worker_addresses(known: Mapping[str, Any]) -> list[str]:
    """The side channels in a bootstrap server's answer: {rank: {"worker_addr": {tp: {pp: "tcp://host:port"}}}}."""
    ranks = (rank["worker_addr"] for rank in known.values())
    return [address for rank in ranks for workers in rank.values() for address in workers.values()]


async def _dial(name: str, address: str) -> None:
    place = urlsplit(address)
    try:
        async with asyncio.timeout(_DIAL_S):
            _, writer = await asyncio.open_connection(place.hostname, place.port)
    except (OSError, TimeoutError) as exc:
        raise LauncherError(
            f"{name} tells its peers {address}, and nothing answers there ({exc!r})",
            "Is --host an address of the network that the nodes share? Does a firewall stand between?",
        ) from exc
    writer.close()


def _transfer_ports_in(log: Path) -> list[int]:
    """Ports a node's transfer engines say they listen on."""
    ports = []
    for line in logs.lines(log):
        fact = known(line.text)
        if fact is not None and fact.id in ("fact-te-rpc", "fact-te-data"):
            match = fact.pattern.search(line.text)
            if match:
                ports.append(int(match["port"]))
    return ports
