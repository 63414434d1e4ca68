"""What can be seen of a real pair: one trace with vLLM's spans in it, one request by stages, the page."""

import json
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import shown
from tests.launched import Page, Up, run_to_end
from tests.otlp import Sink
from tests.processes import http, wait_until

pytestmark = pytest.mark.timeout(1200)

PROMPT = "What is seen of a request says where its time went, and on which node. " * 4


def ask(run: Up, request_id: str) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": request_id + PROMPT}], "max_tokens": 16}
    return http.post(
        f"{run.url}/v1/chat/completions", json=body, headers={"x-request-id": request_id}, timeout=300
    ).raise_for_status()


def test_vllms_spans_hang_under_the_legs_that_asked_for_them(real_pair: Up, traces: Sink) -> None:
    ask(real_pair, "in-a-trace")
    root = traces.root("in-a-trace")
    assert root.name == "chat tiny"
    wait_until(lambda: len([s for s in traces.of(root.trace) if s.name == "llm_request"]) == 2, "vLLM's spans", 120)
    own = {span.service: span for span in traces.of(root.trace) if span.name == "llm_request"}
    legs = {span.name: span for span in traces.children(root)}
    assert {name: span.parent for name, span in own.items()} == {
        "prefill-0": legs["pd.prefill"].id,
        "decode-0": legs["pd.decode"].id,
    }
    assert own["decode-0"].attributes["gen_ai.usage.prompt_tokens"] == root.attributes["gen_ai.usage.input_tokens"]
    assert {span.trace for span in own.values()} == {root.trace}


def test_the_stages_of_a_request_are_all_of_its_time(real_pair: Up) -> None:
    ask(real_pair, "by-stages")
    told = json.loads(
        wait_until(lambda: _if_known("trace", "by-stages", "--json", "--run-dir", str(real_pair.run_dir)), "the trace")
    )
    request = told["requests"][0]
    stages = request["stages"]
    assert [stage["name"] for stage in stages] == ["queue", "read", "prefill", "hand-off", "decode"]
    assert stages[2]["tokens"] == request["prompt_tokens"]
    assert all(stage["seconds"] > 0 for stage in stages[2:])
    ends = [stage["began"] + stage["seconds"] for stage in stages]
    assert all(stage["began"] > end - 0.001 for stage, end in zip(stages[1:], ends[:-1], strict=True))
    assert ends[-1] <= request["seconds"] + 0.001
    between = request["seconds"] - sum(stage["seconds"] for stage in stages)
    print(f"of {request['seconds']:.3f} s {between * 1000:.1f} ms are in no stage")  # noqa: T201  measured, not asserted


def _if_known(*command: str) -> str | None:
    result = run_to_end(command)
    return result.stdout if result.returncode == 0 else None


def test_the_page_shows_that_kv_moves(real_pair: Up) -> None:
    for number in range(4):
        ask(real_pair, f"on-the-page-{number}")
    with shown(Page(real_pair.run_dir).address, width=1100) as browser:
        page = browser.page
        expect(page.locator("#status")).to_have_text("ok")
        expect(page.locator("#pairs")).to_contain_text("KV proven to move")
        expect(page.locator(".request", has_text="on-the-page-3").locator(".hand-off")).to_have_count(1)
        page.get_by_role("button", name="Log of decode-0").click()
        expect(page.locator("#inside")).to_contain_text("POST /v1/chat/completions")
        page.keyboard.press("Escape")
        browser.keep("real-pair")
        assert browser.said == []
