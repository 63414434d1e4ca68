"""Several processes serve one port as if they were one."""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.processes import MODEL, Proxy, Sim, http, proxy_in_front_of, sim_node, wait_until

BODY = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}
WORKERS = 3


@pytest.fixture
def served() -> Iterator[tuple[Sim, Sim, Proxy]]:
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        sim_node("decode") as other,
        proxy_in_front_of(prefill, decode, other, flags=["--workers", str(WORKERS)]) as proxy,
    ):
        wait_until(lambda: len(workers(proxy)) == WORKERS, "all workers")
        yield decode, other, proxy


def workers(proxy: Proxy) -> list[psutil.Process]:
    children = psutil.Process(proxy.process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def ask(proxy: Proxy, times: int) -> None:
    """Each on a connection of its own, so that every worker gets some."""
    for _ in range(times):
        assert http.post(f"{proxy.url}/v1/completions", json=BODY).is_success


def all_know(proxy: Proxy, streams: int) -> bool:
    """Whichever answers; asked often enough to hear every worker."""
    return all(proxy.metric("pd_node_in_flight", role="decode") == streams for _ in range(4 * WORKERS))


def test_whichever_is_asked_the_figures_are_those_of_all(served: tuple[Sim, Sim, Proxy]) -> None:
    *_, proxy = served
    ask(proxy, 12)
    for _ in range(6):
        for series in ("pd_requests_total", "pd_request_seconds_count"):
            wait_until(lambda s=series: proxy.metric(s) == 12, "the sum over all workers")  # type: ignore[misc]


def test_load_is_known_across_workers(served: tuple[Sim, Sim, Proxy]) -> None:
    """Twelve streams on two decode nodes: six each, however the workers share them."""
    *nodes, proxy = served
    for node in nodes:
        node.control(fault="hang-after", chunks=1)
    with ExitStack() as streams:
        for number in range(1, 13):
            request = http.stream("POST", f"{proxy.url}/v1/completions", json=BODY | {"stream": True})
            assert streams.enter_context(request).is_success
            wait_until(lambda n=number: all_know(proxy, n), "all workers to know")  # type: ignore[misc]
        assert [proxy.metric("pd_node_in_flight", node=f"decode-{n}") for n in range(2)] == [6, 6]


def test_a_worker_that_dies_comes_back_and_its_counts_stay(served: tuple[Sim, Sim, Proxy]) -> None:
    *_, proxy = served
    ask(proxy, 9)
    wait_until(lambda: proxy.metric("pd_requests_total", status="200") == 9, "the sum")
    dead = workers(proxy)[0]
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    wait_until(lambda: len(workers(proxy)) == WORKERS, "the new worker")
    ask(proxy, 3)
    wait_until(lambda: proxy.metric("pd_requests_total", status="200") == 12, "the sum")


def test_nothing_is_left_when_they_have_ended(served: tuple[Sim, Sim, Proxy]) -> None:
    *_, proxy = served
    running = workers(proxy)
    boards = set(Path("/dev/shm").glob("pd-proxy-board-*"))
    assert boards
    proxy.process.terminate()
    assert proxy.process.wait(60) == 0
    assert not any(worker.is_running() for worker in running)
    assert boards - set(Path("/dev/shm").glob("pd-proxy-board-*")) == boards


def test_workers_come_back_while_the_topology_file_is_broken_and_one_of_them_probes_for_all(tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    with sim_node("prefill") as prefill, sim_node("decode") as decode:
        nodes = [
            {"name": "p", "role": "prefill", "url": prefill.url, "bootstrap": prefill.bootstrap},
            {"name": "d", "role": "decode", "url": decode.url},
        ]
        file.write_text(json.dumps({"nodes": nodes}))
        with proxy_in_front_of(flags=["--workers", "2", "--topology", str(file)], wait=False) as proxy:
            wait_until(lambda: len(workers(proxy)) == 2, "both workers")
            file.write_text('{"nodes": [{"name": "half')
            for dead in workers(proxy):
                dead.send_signal(signal.SIGKILL)
                dead.wait()
            wait_until(lambda: len(workers(proxy)) == 2, "both workers again")
            wait_until(lambda: proxy.health()["status"] == "ok", "the last good topology")
            ask(proxy, 4)
            decode.control(refuse_s=60)
            wait_until(lambda: proxy.metric("pd_node_usable", node="d") == 0, "the death of the node to be seen")
            wait_until(lambda: all(proxy.metric("pd_node_usable", node="d") == 0 for _ in range(8)), "... by both")


def test_what_no_worker_can_start_with_ends_the_proxy(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k")
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--workers", "2", "--api-keys-file", str(keys)]) as proxy,
    ):
        wait_until(lambda: len(workers(proxy)) == 2, "both workers")
        keys.unlink()
        for dead in workers(proxy):
            dead.send_signal(signal.SIGKILL)
        proxy.process.wait(120)
