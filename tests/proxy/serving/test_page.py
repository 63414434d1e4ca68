"""The page of the admin listener, and what it asks for: every node and request is on it, and nobody else's page is."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser import shown
from tests.processes import MODEL, ROOT, Proxy, Sim, free_port, http, proxy_in_front_of, sim_node, wait_until

BODY: dict[str, Any] = {"model": MODEL, "prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}
HOSTILE = "<img src=x onerror=alert(1)>"


@dataclass
class Seen:
    """A proxy with a page."""

    url: str
    proxy: Proxy
    prefill: Sim
    decode: Sim

    def ask(self, request_id: str = "", **fields: Any) -> httpx.Response:
        headers = {"x-request-id": request_id} if request_id else {}
        return http.post(f"{self.proxy.url}/v1/completions", json=BODY | fields, headers=headers, timeout=60)

    def request(self, request_id: str) -> dict[str, Any]:
        answer = wait_until(lambda: _if_known(f"{self.url}/requests/{request_id}"), request_id)
        found: dict[str, Any] = answer["requests"][0]
        return found


def _if_known(url: str) -> Any:
    answer = http.get(url)
    return answer.json() if answer.is_success else None


@contextmanager
def page_of(
    prefill: Sim, decode: Sim, *flags: str, env: dict[str, str] | None = None, topology: Path | None = None
) -> Iterator[Seen]:
    port = free_port()
    nodes = [] if topology else [prefill, decode]
    given = ["--admin-port", str(port), *flags, *(["--topology", str(topology)] if topology else [])]
    with proxy_in_front_of(*nodes, flags=given, env=env, wait=topology is None) as proxy:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(url), "the page")
        proxy.until_usable(2)
        yield Seen(url, proxy, prefill, decode)


def _answers(url: str) -> bool:
    try:
        return http.get(url).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def _seen() -> Iterator[Seen]:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, page_of(prefill, decode) as seen:
        yield seen


@pytest.fixture
def seen(_seen: Seen) -> Seen:
    http.post(f"{_seen.url}/nodes/decode-0/undrain")
    _seen.proxy.until_usable(2)
    return _seen


# -- what is asked for


def test_a_request_is_told_by_stages_that_follow_each_other(seen: Seen) -> None:
    assert seen.ask("by-stages").is_success
    told = seen.request("by-stages")
    assert (told["status"], told["path"], told["model"], told["attempts"]) == (200, "disaggregated", MODEL, 1)
    stages = told["stages"]
    assert [stage["name"] for stage in stages] == ["queue", "read", "prefill", "hand-off", "decode"]
    assert [stage.get("node") for stage in stages[2:]] == ["prefill-0", "decode-0", "decode-0"]
    assert stages[2]["kv"] == "taken"
    assert stages[2]["tokens"] == told["prompt_tokens"]
    ends = [stage["began"] + stage["seconds"] for stage in stages]
    assert all(stage["began"] >= end - 0.001 for stage, end in zip(stages[1:], ends[:-1], strict=True))
    assert ends[-1] <= told["seconds"] + 0.001


def test_a_retry_is_a_further_attempt_and_says_what_the_first_failed_of(seen: Seen) -> None:
    seen.prefill.control(fault="status", status=503, times=1)
    assert seen.ask("tried-again").is_success
    told = seen.request("tried-again")
    assert told["attempts"] == 2
    first = next(stage for stage in told["stages"] if stage["name"] == "prefill")
    assert (first["attempt"], first["problem"]) == (1, "503")


def test_a_request_that_runs_is_told_of_too(seen: Seen) -> None:
    seen.decode.control(itl_s=0.5)
    request = "POST", f"{seen.proxy.url}/v1/completions"
    try:
        body = BODY | {"stream": True, "max_tokens": 16}
        with http.stream(*request, json=body, headers={"x-request-id": "runs"}, timeout=60) as answer:
            chunks = answer.iter_bytes()
            next(chunks)
            told = seen.request("runs")
            assert told["running"]
            assert told["stages"][-1]["name"] == "decode"
            assert told["stages"][-1]["running"]
    finally:
        seen.decode.control(itl_s=0)
    wait_until(lambda: seen.request("runs")["status"] == 499, "the client to have left")
    assert seen.request("runs")["stages"][-1]["problem"] == "cut short"


def test_several_sequences_are_parts_of_one_request(seen: Seen) -> None:
    assert seen.ask("of-two", n=2, temperature=1).is_success
    told = seen.request("of-two")
    assert len({stage["part"] for stage in told["stages"] if stage["name"] == "hand-off"}) == 2
    assert told["nodes"].count("decode-0") == 2


def test_an_id_that_nobody_knows_is_404(seen: Seen) -> None:
    answer = http.get(f"{seen.url}/requests/never-heard-of")
    assert answer.status_code == 404
    assert "never-heard-of" in answer.json()["error"]["message"]


def test_requests_of_all_workers_are_known(prefill: Sim, decode: Sim) -> None:
    with page_of(prefill, decode, "--workers", "2") as seen:
        names = [f"of-a-worker-{number}" for number in range(12)]
        for name in names:
            assert seen.ask(name).is_success
        told = [seen.request(name) for name in names]
        assert {one["status"] for one in told} == {200}
        assert all([stage["name"] for stage in one["stages"]][-1] == "decode" for one in told)


def test_no_prompt_and_no_answer_is_told(seen: Seen) -> None:
    assert seen.ask("secret", prompt="my-prompt-is-a-secret", max_tokens=8).is_success
    seen.request("secret")
    for path in ("/state", "/requests", "/requests/secret"):
        assert "my-prompt" not in http.get(f"{seen.url}{path}").text


def test_the_last_lines_of_a_nodes_log_are_told_if_the_topology_names_it(
    prefill: Sim, decode: Sim, tmp_path: Path
) -> None:
    log = tmp_path / "prefill-0.log"
    log.write_text("".join(f"line {number}\n" for number in range(50_000)))
    with page_of(prefill, decode, topology=topology_of(prefill, decode, tmp_path, log=str(log))) as seen:
        lines = http.get(f"{seen.url}/nodes/prefill-0/log").text.splitlines()
        assert lines[-1] == "line 49999"
        assert len(lines) == 200
        assert http.get(f"{seen.url}/nodes/decode-0/log").status_code == 404
        named = {"role": "decode", "url": decode.url, "log": "/etc/passwd"}
        assert http.put(f"{seen.url}/nodes/decode-0", json=named).status_code == 400


# -- who may ask


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "/nodes/decode-0/drain", {"origin": "http://evil.example"}),
        ("POST", "/nodes/decode-0/drain", {"sec-fetch-site": "cross-site"}),
        ("DELETE", "/nodes/decode-0", {"origin": "null"}),
        ("GET", "/state", {"host": "evil.example"}),
        ("GET", "/", {"host": "evil.example:8010"}),
        ("GET", "/state", {"host": "[::1"}),
        ("POST", "/nodes/decode-0/drain", {"host": "evil.example", "origin": "http://evil.example"}),
    ],
)
def test_another_sites_page_in_a_browser_here_is_refused(
    seen: Seen, method: str, path: str, headers: dict[str, str]
) -> None:
    assert http.request(method, f"{seen.url}{path}", headers=headers).status_code == 403
    assert len(seen.proxy.health()["nodes"]) == 2


def test_a_page_client_that_never_reads_keeps_nobody_waiting(seen: Seen) -> None:
    address = urlsplit(seen.url)
    silent = [socket.create_connection((address.hostname, address.port)) for _ in range(20)]
    try:
        for one in silent:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(20):
            assert seen.ask().is_success
        assert http.get(f"{seen.url}/state").is_success
    finally:
        for one in silent:
            one.close()


def test_it_is_one_small_file_that_asks_nobody_else() -> None:
    page = (ROOT / "proxy" / "serving" / "page" / "page.html").read_text()
    assert len(page.encode()) < 60_000
    assert set(re.findall(r"https?://[^\"' )]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page


# -- in a browser


def test_nodes_and_requests_are_shown_and_one_is_explained(seen: Seen) -> None:
    for number in range(5):
        seen.ask(f"shown-{number}")
    with shown(f"{seen.url}/") as browser:
        page = browser.page
        expect(page.locator("#status")).to_have_text("ok")
        expect(page.locator("#prefill .card .name")).to_have_text(["prefill-0"])
        expect(page.locator("#decode .card .name")).to_have_text(["decode-0"])
        expect(page.locator("#ribbons path")).to_have_count(1)
        row = page.locator(".request", has_text="shown-4")
        for stage in ("prefill", "hand-off", "decode"):
            expect(row.locator(f".{stage}")).to_have_count(1)
        browser.keep("page")
        row.click()
        expect(page.locator("#title")).to_have_text("shown-4")
        expect(page.locator("#inside")).to_contain_text("KV taken")
        browser.keep("page-request")
        assert browser.said == []


def test_requests_are_filtered_by_outcome(seen: Seen) -> None:
    seen.ask("it-is-well")
    assert seen.ask("it-is-not", model="nope").status_code == 404
    with shown(f"{seen.url}/") as browser:
        page = browser.page
        expect(page.locator(".request", has_text="it-is-well")).to_have_count(1)
        page.select_option("#filter", "failed")
        expect(page.locator(".request", has_text="it-is-not")).to_have_count(1)
        expect(page.locator(".request", has_text="it-is-well")).to_have_count(0)


def test_a_node_is_drained_and_undrained_by_keyboard(seen: Seen) -> None:
    with shown(f"{seen.url}/", dark=True) as browser:
        page = browser.page
        button = page.get_by_role("button", name="Drain decode-0", exact=True)
        button.focus()
        page.keyboard.press("Enter")
        expect(page.locator(".card.drain")).to_contain_text("decode-0")
        expect(page.locator("#marks")).to_contain_text("decode-0 draining")
        browser.keep("page-drained")
        page.get_by_role("button", name="Undrain decode-0").click()
        expect(page.locator(".card.drain")).to_have_count(0)
        assert browser.said == []


def test_a_node_that_was_killed_is_red_and_says_why(prefill: Sim) -> None:
    with (
        sim_node("decode") as dying,
        page_of(prefill, dying) as seen,
        shown(f"{seen.url}/") as browser,
    ):
        page = browser.page
        expect(page.locator(".card")).to_have_count(2)
        dying.process.kill()
        expect(page.locator(".card.down .name")).to_have_text("decode-0")
        expect(page.locator(".card.down .why.bad")).to_contain_text("cannot be reached")
        expect(page.locator("#status")).to_have_text("unavailable")
        expect(page.locator("#marks")).to_contain_text("decode-0 is not usable")
        browser.keep("page-down")


def test_a_proxy_that_is_gone_is_told_of(prefill: Sim, decode: Sim) -> None:
    port = free_port()
    with proxy_in_front_of(prefill, decode, flags=["--admin-port", str(port)]) as proxy:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}"), "the page")
        with shown(f"http://127.0.0.1:{port}/") as browser:
            expect(browser.page.locator(".card")).to_have_count(2)
            proxy.process.terminate()
            expect(browser.page.locator("#lost")).to_contain_text("not been heard of")
            browser.keep("page-lost")


def test_a_hidden_page_asks_nothing(seen: Seen) -> None:
    with shown(f"{seen.url}/") as browser:
        page = browser.page
        expect(page.locator(".card")).to_have_count(2)
        with page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
            page.evaluate(
                "Object.defineProperty(document, 'hidden', {configurable: true, get: () => true});"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )
        with page.expect_request("**/events"):
            page.evaluate(
                "Object.defineProperty(document, 'hidden', {configurable: true, get: () => false});"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )


def test_it_fits_a_phone(seen: Seen) -> None:
    seen.ask("on-a-phone" + "-with-a-very-long-id" * 5)
    with shown(f"{seen.url}/", width=360, height=740) as browser:
        page = browser.page
        expect(page.locator(".card")).to_have_count(2)
        expect(page.locator(".request").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        browser.keep("page-phone")


def test_what_nodes_and_clients_are_called_is_text_and_no_more(prefill: Sim, decode: Sim, tmp_path: Path) -> None:
    file = topology_of(prefill, decode, tmp_path, name=HOSTILE, finding=f"{HOSTILE} <script>alert(2)</script>")
    with page_of(prefill, decode, topology=file) as seen:
        assert seen.ask("hostile", model="<script>alert(3)</script>").status_code == 404
        with shown(f"{seen.url}/") as browser:
            page = browser.page
            expect(page.locator("#prefill .name")).to_have_text(HOSTILE)
            page.locator(".request", has_text="hostile").click()
            expect(page.locator("#inside")).to_contain_text("<script>alert(3)</script>")
            assert page.locator("img").count() == 0
            assert browser.said == []


def test_with_a_key_the_page_asks_for_it(prefill: Sim, decode: Sim) -> None:
    with page_of(prefill, decode, env={"PD_PROXY_ADMIN_KEY": "the-admin-key"}) as seen:
        assert http.get(f"{seen.url}/state").status_code == 401
        with shown(f"{seen.url}/") as browser:
            page = browser.page
            page.fill("#key", "wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#refused")).to_contain_text("not the admin key")
            page.fill("#key", "the-admin-key")
            page.keyboard.press("Enter")
            expect(page.locator(".card")).to_have_count(2)


def topology_of(prefill: Sim, decode: Sim, folder: Path, **of_the_first: str) -> Path:
    """A topology file with these nodes; `of_the_first`: what is said of the prefill node, too."""
    file = folder / "topology.json"
    nodes = [
        {"name": "prefill-0", "role": "prefill", "url": prefill.url, "bootstrap": prefill.bootstrap} | of_the_first,
        {"name": "decode-0", "role": "decode", "url": decode.url},
    ]
    file.write_text(json.dumps({"nodes": nodes}))
    return file
