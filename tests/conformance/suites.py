"""The suites: what each needs, and what it is started with."""

from dataclasses import dataclass, field
from pathlib import Path

from engines.openai.routes import REFUSED
from launcher.setup.install import EngineEnvironment

HERE = Path(__file__).parent
VLLM = "0.32.0"
NAMES = (
    "tiny",
    "HuggingFaceH4/zephyr-7b-beta",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "claude-3-7-sonnet-latest",
    "facebook/opt-125m",
)
"""What the pair calls its model: vLLM's tests name theirs."""
PYTEST = ("pytest==9.0.3", "pytest-asyncio==1.4.0", "pytest-timeout==2.4.0")


@dataclass(frozen=True)
class Suite:
    """Somebody's tests, run by pytest in an environment of their own."""

    title: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    """Arguments for pytest; relative to the suite's folder where they name no file of ours."""
    with_engine: bool = False
    """Whether it imports vllm: its environment then sees the engine's packages too."""
    vllm_source: bool = False
    """Whether it is a part of vLLM's source package."""
    patience_s: int = 120
    """For one test."""
    known: dict[str, str] = field(default_factory=dict)
    """Tests that one node passes and the pair does not, by the end of their name, with the reason."""


SUITES = {
    "openai": Suite("OpenAI's client: helpers for streams and tools", ("openai",), (str(HERE / "with_openai.py"),)),
    "anthropic": Suite("Anthropic's client: helpers for streams", ("anthropic",), (str(HERE / "with_anthropic.py"),)),
    "langchain": Suite(
        "LangChain's standard tests of chat models",
        ("langchain-openai==1.7.4", "langchain-tests==1.1.9"),
        (str(HERE / "with_langchain.py"),),
    ),
    "lm-eval": Suite(
        "lm-eval: log probabilities of given text, and generation",
        ("lm_eval[api]==0.4.13", "transformers"),
        (str(HERE / "with_lm_eval.py"),),
        patience_s=600,
    ),
    "bench": Suite("vllm bench serve", (), (str(HERE / "with_vllm_bench.py"),), with_engine=True, patience_s=600),
    "guidellm": Suite("guidellm", ("guidellm==0.8.1",), (str(HERE / "with_guidellm.py"),), patience_s=600),
    "schemathesis": Suite(
        "schemathesis, with the engine's schema",
        ("schemathesis==4.32.5",),
        (str(HERE / "with_schemathesis.py"),),
        patience_s=1200,
    ),
    "vllm": Suite(
        "vLLM's own tests of its API",
        ("anthropic", "openai", "schemathesis==4.32.5", "tblib", "tensorizer", "pqdm", "albumentations"),
        (
            "tests/entrypoints/openai",
            "tests/entrypoints/anthropic",
            "tests/entrypoints/serve/tokenize",
            "tests/entrypoints/serve/instrumentator/test_basic.py",
            "tests/entrypoints/generate",
            "tests/entrypoints/scale_out/token_in_token_out/test_serving_tokens.py",
        ),
        with_engine=True,
        vllm_source=True,
        known={
            "test_invocations": REFUSED["/invocations"],
            "test_long_seed": "a number beyond 64 bits reaches the node rounded; it is refused, in other words",
            **{f" {path}]": reason for path, reason in REFUSED.items()},
        },
    ),
}


def engine() -> EngineEnvironment:
    return EngineEnvironment.of("cpu", VLLM)
