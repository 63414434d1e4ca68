"""Models of every kind on real pairs: `make test-models`. Not a part of `make test`: each starts engines of its own.

Each kind must pass the suite of parity (a request is answered as one node alone would answer it, and no KV is left),
and what is its own. Where vLLM or Mooncake cannot do something on a CPU, it is said at the kind.
"""

import base64
import json
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.setup.install import EngineEnvironment
from tests.launched import Up, up
from tests.parity import *  # noqa: F403
from tests.parity import CHAT, COMPLETION, MODEL, PROMPT, System
from tests.processes import events, free_port, http, metric, proxy_in_front_of, running, wait_until

START_PATIENCE_S = 900
MAKER = Path(__file__).parent / "make.py"
TINY = "tiny"
FLOAT32 = "--args=--dtype=float32"
"""As in examples/cpu-1p1d.yaml: answers that go on from their own first tokens can be compared."""

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Kind:
    """A model, and how it is started."""

    model: str
    """What `make.py` makes, or the demo's own."""
    flags: tuple[str, ...] = (FLOAT32,)
    computed: int = 0
    """Tokens of each prompt that the decode node computes itself."""
    adapters: tuple[str, ...] = ()


MLA = Kind("mla")
"""On a CPU vLLM 0.32 computes it wrong on one node already: behind 16 tokens the log probabilities of a prompt's first
tokens change with a token that is appended to it, and its decode says something else than its prefill. So answers
cannot be compared with one node's, but for what is one block long.
"""
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
KINDS = {
    "gqa": Kind("gqa"),
    "moe": Kind("moe"),
    "sliding": Kind("sliding"),
    # On a CPU vLLM 0.32 says of another data type: "CPU GDN attention requires BF16."
    "hybrid": Kind("hybrid", flags=(), computed=1),
    # On a CPU vLLM 0.32 dies of Mamba-2 with a prefix cache: "IndexError: index 14 is out of bounds for dimension 0
    # with size 1", in conv_ssm_forward of its mamba_mixer2.py.
    "mamba": Kind("mamba", flags=(FLOAT32, "--prefill-args=--no-enable-prefix-caching"), computed=1),
    # vLLM 0.32 imports most models that see with torchvision, of which PyPI has the CUDA build only; not this one.
    "vision": Kind("vision", flags=(FLOAT32, "--args=--chat-template-content-format=string")),
    "reasoning": Kind("reasoning", flags=(FLOAT32, "--args=--reasoning-parser=deepseek_r1")),
    "lora": Kind(TINY, flags=(FLOAT32, "--args=--enable-lora"), adapters=("adapter-1", "adapter-2")),
    "ngram": Kind(
        TINY,
        flags=(
            FLOAT32,
            f"--decode-args=--speculative-config={json.dumps(NGRAM)}",
        ),
    ),
}


NOT_AS_ONE_NODE = {
    "reasoning": (
        "the suite looks for text, and all that this model says is reasoning, an empty answer too",
        ("responses_and_messages", "streaming_helper", "eos_or_a_stop_id_as_the_first_token"),
    ),
    "hybrid": (
        "in bfloat16 several sequences in one step are rounded in another way than one by one",
        ("list of prompts", "two choices", "thirty_two_at_once"),
    ),
    "ngram": (
        "a node that guesses tokens samples with other random numbers, and refuses logit_bias; the other one does not",
        ("seeded sample", "two choices", "twice each", "eos_or_a_stop_id_as_the_first_token"),
    ),
}
"""Cases of the suite of parity in which one node does not say the same as another way of asking it, and why."""
WHOLE_PROMPTS = ("hybrid", "mamba")
"""The suite expects that every token of a prompt moves; the last one's state is computed by the decode node."""


@pytest.fixture(autouse=True)
def _what_one_node_does_not_do_either(request: pytest.FixtureRequest) -> None:
    name = request.node.name
    for kind, (why, cases) in NOT_AS_ONE_NODE.items():
        if f"[{kind}" in name and any(case in name for case in cases):
            pytest.xfail(why)
    if any(f"[{kind}]" in name for kind in WHOLE_PROMPTS) and "a_prompt_of_token_ids" in name:
        pytest.xfail("all but the last token of a prompt move")


def made(what: str, folder: Path) -> Path:
    if not folder.exists():
        python = EngineEnvironment.of("cpu").python
        subprocess.run([python, str(MAKER), what, str(folder)], check=True, capture_output=True)
    return folder


@dataclass(frozen=True)
class Run:
    name: str
    kind: Kind
    up: Up

    def computed(self) -> float:
        url = self.up.nodes("decode")[0]
        return metric(url, "vllm:prompt_tokens_by_source_total", source="local_compute")


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    kind, folder = (KINDS | {"mla": MLA})[request.param], tmp_path_factory.mktemp(request.param)
    model = TINY if kind.model == TINY else str(made(kind.model, folder / "model"))
    modules = [f"{name}={made(name, folder / name)}" for name in kind.adapters]
    flags = ["--device", "cpu", "--model", model, "--served-model-name", MODEL, "--transfer-timeout-s", "600"]
    flags += ["--proxy-args=--canary-interval-s=100000", "--proxy-args=--allow-private-media", *kind.flags]
    if modules:
        flags += ["--args=--lora-modules", *(f"--args={module}" for module in modules)]
    with up(folder, *flags) as started:
        started.until("Ready:", START_PATIENCE_S)
        yield Run(request.param, kind, started)
        assert started.end() == 0


@pytest.fixture
def system(run: Run) -> System:
    prefill, decode = run.up.nodes("prefill")[0], run.up.nodes("decode")[0]
    return System(run.up.url, prefill, decode, eos=1, token_ids=list(range(20, 60)))


def of(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", [kind], indirect=True, scope="module")


# -- of every kind


def test_the_pair_answers_as_its_decode_node_does_alone(run: Run) -> None:
    told = http.get(f"{run.up.url}/health").json()["canary"]
    assert (told["same"], told["differs"], told["not_judged"]) == (1, [], [])


@pytest.mark.parametrize("times", [1, 2])
def test_kv_moves_and_the_decode_node_computes_no_more_than_it_must(run: Run, system: System, times: int) -> None:
    """The second time the prefill node has the prompt in its cache."""
    for number in range(times):
        moved, computed = system.transferred(), run.computed()
        body = COMPLETION | {"prompt": f"{times}. {PROMPT * 3}"}
        answer = http.post(f"{system.proxy}/v1/completions", json=body, timeout=300).json()
        alone = http.post(f"{system.decode}/v1/completions", json=body, timeout=300).json()
        assert answer["choices"][0]["text"] == alone["choices"][0]["text"], number
        tokens = answer["usage"]["prompt_tokens"]
        system.until_free()
        assert system.transferred() - moved == tokens - run.kind.computed
        assert run.computed() - computed == tokens + run.kind.computed  # those of its answer alone, too


# -- MLA


@of("mla")
@pytest.mark.parametrize("tokens", [1, 7])
def test_kv_of_a_compressed_latent_moves_and_the_answer_goes_on_as_on_one_node(system: System, tokens: int) -> None:
    """The pair is asked for what follows the first token: either way the decode node makes each in a step by itself."""
    body = COMPLETION | {"prompt": system.token_ids[:tokens], "return_token_ids": True, "ignore_eos": True}
    alone = http.post(f"{system.decode}/v1/completions", json=body, timeout=300).json()["choices"][0]["token_ids"]
    moved = system.transferred()
    body |= {"prompt": [*system.token_ids[:tokens], alone[0]], "max_tokens": len(alone) - 1}
    answer = http.post(f"{system.proxy}/v1/completions", json=body, timeout=300)
    assert answer.headers["x-pd-path"] == "disaggregated"
    assert answer.json()["choices"][0]["token_ids"] == alone[1:]
    system.until_free()
    assert system.transferred() - moved == tokens + 1


@of("mla")
def test_kv_of_many_blocks_of_a_compressed_latent_moves(system: System) -> None:
    moved = system.transferred()
    answer = http.post(f"{system.proxy}/v1/completions", json=COMPLETION | {"prompt": PROMPT * 3}, timeout=300).json()
    system.until_free()
    assert system.transferred() - moved == answer["usage"]["prompt_tokens"] > 16 * 8


# -- vision


def png(shade: int) -> bytes:
    """56 by 56 pixels, a gradient that depends on `shade`."""
    rows = b"".join(b"\0" + bytes((shade * (x + y) + c) % 256 for x in range(56) for c in range(3)) for y in range(56))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 56, 56, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def seen(shade: int, **fields: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png(shade)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
    return CHAT | {"messages": [{"role": "user", "content": parts}]} | fields


@of("vision")
@pytest.mark.parametrize("stream", [False, True])
def test_an_image_is_seen_by_both_nodes(system: System, *, stream: bool) -> None:
    said = {}
    for shade in (3, 50):
        body = seen(shade, stream=stream)
        answers = [
            http.post(f"{url}/v1/chat/completions", json=body, timeout=300) for url in (system.proxy, system.decode)
        ]
        texts = [_text(answer, stream=stream) for answer in answers]
        assert answers[0].headers["x-pd-path"] == "disaggregated"
        assert texts[0] == texts[1]
        said[shade] = texts[0]
    assert said[3] != said[50], "it is seen"


def _text(answer: Any, *, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["message"]["content"])
    chunks = [event for event in events(answer) if event != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


# -- reasoning


@of("reasoning")
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart_as_one_node_tells_it(system: System, *, stream: bool) -> None:
    body = CHAT | {"stream": stream}
    told = [http.post(f"{url}/v1/chat/completions", json=body, timeout=300) for url in (system.proxy, system.decode)]
    if stream:
        deltas = [
            "".join(
                choice["delta"].get("reasoning") or ""
                for event in events(answer)
                if event != "[DONE]"
                for choice in event["choices"]
            )
            for answer in told
        ]
        assert deltas[0] == deltas[1] != ""
    else:
        messages = [answer.json()["choices"][0]["message"] for answer in told]
        assert messages[0]["reasoning"] == messages[1]["reasoning"] != ""
        assert messages[0]["content"] == messages[1]["content"]


# -- LoRA


@of("lora")
def test_each_adapter_answers_as_on_one_node_and_each_in_its_own_way(run: Run, system: System) -> None:
    said = set()
    for model in (MODEL, *run.kind.adapters):
        body = COMPLETION | {"model": model}
        answer = http.post(f"{system.proxy}/v1/completions", json=body, timeout=300)
        alone = http.post(f"{system.decode}/v1/completions", json=body, timeout=300).json()
        assert answer.headers["x-pd-path"] == "disaggregated"
        assert answer.json()["choices"][0]["text"] == alone["choices"][0]["text"]
        said.add(alone["choices"][0]["text"])
    assert len(said) == 3


# -- embeddings


@contextmanager
def _pooling_node(model: Path) -> Iterator[str]:
    port, python = free_port(), EngineEnvironment.of("cpu").python
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--runner", "pooling"]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with running(command, settings) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: http.get(f"{url}/health").is_success or process.poll(), "the node", START_PATIENCE_S)
        yield url


def test_embeddings_come_through_as_one_node_gives_them(tmp_path: Path) -> None:
    """No hand-off: an encoder makes no tokens. It is a decode node without a prefill node."""
    with _pooling_node(made("embeddings", tmp_path / "model")) as url:
        node = {"name": "decode-0", "role": "decode", "url": url}
        (tmp_path / "topology.json").write_text(json.dumps({"nodes": [node]}))
        with proxy_in_front_of(flags=["--topology", str(tmp_path / "topology.json")], probe=False) as proxy:
            wait_until(lambda: http.get(f"{proxy.url}/readyz").is_success, "the proxy")
            body = {"model": MODEL, "input": ["the quick brown fox", "jumps over"]}
            answer = http.post(f"{proxy.url}/v1/embeddings", json=body)
            alone = http.post(f"{url}/v1/embeddings", json=body).json()
            assert answer.headers["x-pd-path"] == "aggregated; reason=route"
            assert json.dumps(answer.json()["data"]) == json.dumps(alone["data"])
            assert len(alone["data"]) == 2
