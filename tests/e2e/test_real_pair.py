"""A real vLLM prefill node and a real vLLM decode node with the Mooncake transfer engine, through the proxy."""

import os
import subprocess
import sys
from typing import Any

import openai
import pytest

from engines.openai.routes import HANDED_OFF, PASSED_ON, REFUSED
from launcher.setup.environments import tiny_model_path
from launcher.setup.install import EngineEnvironment
from tests.launched import Up
from tests.processes import ROOT, http, metric, openai_client, wait_until
from tests.reference import OWN

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the engines to start

PROMPT = "Prefill computes the KV cache of a prompt, and decode generates from it. " * 5
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]


def complete(url: str, *, stream: bool, **fields: Any) -> tuple[str, Any]:
    """(text, usage), through the OpenAI client."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0} | fields
    with openai_client(url) as client:
        if not stream:
            answer = client.completions.create(**asked)
            return answer.choices[0].text, answer.usage
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices), chunks[-1].usage


def chat(url: str, *, stream: bool, **fields: Any) -> tuple[str, Any]:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0} | fields
    with openai_client(url) as client:
        if not stream:
            answer = client.chat.completions.create(**asked)
            return answer.choices[0].message.content or "", answer.usage
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks[-1].usage


def transferred(run: Up) -> float:
    return sum(
        metric(url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer") for url in run.nodes("decode")
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
def test_the_pairs_answer_is_the_prefill_nodes_own_and_its_kv_was_moved(real_pair: Up, ask: Any, stream: bool) -> None:
    own = f"{ask.__name__} {stream} "
    asked = {"prompt": own + PROMPT} if ask is complete else {"messages": [{"role": "user", "content": own}, *MESSAGES]}
    before = transferred(real_pair)
    text, usage = ask(real_pair.url, stream=stream, **asked)
    alone, usage_alone = ask(real_pair.nodes("prefill")[0], stream=stream, **asked)
    assert text == alone
    assert len(text) > 10
    assert (usage.prompt_tokens, usage.completion_tokens) == (usage_alone.prompt_tokens, usage_alone.completion_tokens)
    wait_until(lambda: transferred(real_pair) >= before + usage.prompt_tokens, "the decode node to count the transfer")
    assert transferred(real_pair) == before + usage.prompt_tokens


def test_a_prompt_is_moved_whole_every_time_and_never_taken_from_the_decode_nodes_own_cache(real_pair: Up) -> None:
    """What came in late over TCP may be in there: see engines/vllm/command.py."""
    before = transferred(real_pair)
    answers = [complete(real_pair.url, stream=False, prompt="Twice the same. " + PROMPT) for _ in range(2)]
    tokens = answers[0][1].prompt_tokens
    assert answers[0][0] == answers[1][0]
    wait_until(lambda: transferred(real_pair) >= before + 2 * tokens, "the decode node to count both transfers")
    assert transferred(real_pair) == before + 2 * tokens


def test_up_has_shown_an_answer_and_how_much_kv_moved(real_pair: Up) -> None:
    assert "answered" in real_pair.output
    assert "prompt tokens, counted by the decode node" in real_pair.output


def test_eos_as_the_first_token_ends_the_answer_and_hangs_nothing(real_pair: Up) -> None:
    """The prefill leg must mask EOS: vLLM keeps KV only for a request that ends by length."""
    with openai_client(real_pair.url) as client:
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logit_bias={"1": 100}
        )
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"model": "other"}, 404), ({"temperature": -1}, 400), ({"max_tokens": 10**6}, 400), ({"prompt": 5}, 400)],
)
def test_what_the_engine_refuses_reaches_the_client_in_the_engines_words(
    real_pair: Up, fields: dict[str, Any], status: int
) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4} | fields
    answers = [http.post(f"{url}/v1/completions", json=body) for url in (real_pair.url, real_pair.nodes("decode")[0])]
    assert answers[0].status_code == answers[1].status_code == status
    assert answers[0].json() == answers[1].json()


def test_several_prompts_are_handed_over_one_by_one_and_leave_no_kv_behind(real_pair: Up) -> None:
    with openai_client(real_pair.url) as client:
        answer = client.completions.with_raw_response.create(
            model="tiny", prompt=["first prompt", "second prompt"], max_tokens=4, temperature=0
        )
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert [choice.index for choice in answer.parse().choices] == [0, 1]
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be free")


@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1}, {"stream": "false"}])
def test_transfer_keys_among_a_clients_extra_arguments_reach_no_engine(real_pair: Up, fields: dict[str, Any]) -> None:
    """Sent to a node as they are, these end its engine (scheduler, `on_new_request`)."""
    extra = {"kv_transfer_params": 0, "ec_transfer_params": ""}
    body = {"model": "tiny", "prompt": "extra", "max_tokens": 4, "vllm_xargs": extra} | fields
    assert http.post(f"{real_pair.url}/v1/completions", json=body, timeout=120).is_success
    for url in (*real_pair.nodes("prefill"), *real_pair.nodes("decode")):
        assert http.get(f"{url}/health", timeout=60).is_success
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be freed")


def test_a_client_that_leaves_in_the_middle_leaves_no_kv_behind(real_pair: Up) -> None:
    with openai_client(real_pair.url) as client:
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=1500, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be free")


BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_vllms_own_load_generator_runs_clean(real_pair: Up) -> None:
    """`vllm bench serve`, from the engine's environment."""
    python = EngineEnvironment.of("cpu").python
    flags = {"backend": "openai-chat", "endpoint": "/v1/chat/completions", "base-url": real_pair.url, "model": "tiny",
             "tokenizer": str(tiny_model_path()), "dataset-name": "random", "random-input-len": "64",
             "random-output-len": "8", "num-prompts": "12"}  # fmt: skip
    command = [str(python), "-c", BENCH, *(part for flag, value in flags.items() for part in (f"--{flag}", value))]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    figures = dict(line.split(":") for line in result.stdout.splitlines() if line.count(":") == 1)
    assert int(figures["Successful requests"]) == 12
    assert int(figures["Failed requests"]) == 0
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be free")


def test_kv_that_a_refusal_left_behind_is_released(real_pair: Up) -> None:
    """VLLM finds this error when a stream has begun, and does not tell the connector; the proxy's release does."""
    done = metric(real_pair.url, "pd_releases_total", outcome="done")
    answer = http.post(
        f"{real_pair.url}/v1/completions", json={"model": "tiny", "prompt": PROMPT, "logprobs": 30}, timeout=60
    )
    assert answer.status_code == 400
    wait_until(lambda: metric(real_pair.url, "pd_releases_total", outcome="done") == done + 1, "the release")
    wait_until(lambda: real_pair.kv_in_use() == 0, "the prefill node's KV to be free", patience_s=30)


def test_the_proxy_has_proof_that_kv_moves(real_pair: Up) -> None:
    decode = next(n for n in http.get(f"{real_pair.url}/health").json()["nodes"] if n["role"] == "decode")
    assert decode["kv"] == "moving"
    assert metric(real_pair.url, "pd_kv_moving") == 1


def test_the_curl_example_runs(real_pair: Up) -> None:
    program = [str(ROOT / "examples" / "curl.sh"), real_pair.url]
    result = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "data: [DONE]" in result.stdout


def test_a_stored_response_is_told_continued_and_one_in_the_background_followed_and_cancelled(real_pair: Up) -> None:
    with openai_client(real_pair.url) as client:
        first = client.responses.create(model="tiny", input=PROMPT, max_output_tokens=8, temperature=0)
        assert client.responses.retrieve(first.id).output_text == first.output_text
        second = client.responses.create(
            model="tiny", input="and then?", previous_response_id=first.id, max_output_tokens=8, temperature=0
        )
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens, "the conversation is in its prompt"
        running = client.responses.create(model="tiny", input=PROMPT, max_output_tokens=8, background=True)
        wait_until(lambda: client.responses.retrieve(running.id).status in ("completed", "incomplete"), "its end")
        kinds = [event.type for event in client.responses.retrieve(_streamed(client), stream=True)]
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")
        endless = {"ignore_eos": True}  # else it may have ended before it is cancelled
        long = client.responses.create(
            model="tiny", input=PROMPT, max_output_tokens=1000, background=True, extra_body=endless
        )
        assert client.responses.cancel(long.id).status == "cancelled"
        with pytest.raises(openai.NotFoundError, match="Response with id 'resp_none' not found"):
            client.responses.retrieve("resp_none")
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be free")


def _streamed(client: openai.OpenAI) -> str:
    """The id of a response that is made as a stream, in the background."""
    with client.responses.create(
        model="tiny", input=PROMPT, max_output_tokens=8, background=True, stream=True
    ) as events:
        return next(event.response.id for event in events if event.type == "response.created")


def test_the_openai_client_example_runs(real_pair: Up) -> None:
    program = [sys.executable, str(ROOT / "examples" / "openai_client.py"), f"{real_pair.url}/v1"]
    result = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_real_nodes_are_healthy_and_hold_nothing_in_the_end(real_pair: Up) -> None:
    health = http.get(f"{real_pair.url}/health").json()
    assert health["status"] == "ok"
    assert [node["in_flight"] for node in health["nodes"]] == [0, 0]
    wait_until(lambda: real_pair.kv_in_use() == 0, "all KV to be free")


def test_every_route_of_the_engine_is_served_passed_on_or_refused_with_a_reason(real_pair: Up) -> None:
    engine = http.get(f"{real_pair.nodes('decode')[0]}/openapi.json").json()["paths"]
    known = {*HANDED_OFF, *PASSED_ON, *REFUSED, *OWN}
    assert engine.keys() - known == set()
