"""`vllm bench serve`, as users measure with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Keep = Callable[[str, object], None]
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` runs; the CPU wheel of vLLM has no command `vllm` that starts."""


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_every_request_is_answered_whole(tmp_path: Path, record_property: Keep, backend: str, endpoint: str) -> None:
    tokenizer = ["--model", "tiny", "--tokenizer", os.environ["PD_TOKENIZER"]]
    data = ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16", "--num-prompts", "24"]
    load = ["--request-rate", "8", "--seed", "3", "--ignore-eos", "--temperature", "0", "--num-warmups", "1"]
    where = ["--base-url", os.environ["PD_URL"], "--backend", backend, "--endpoint", endpoint]
    result = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    command = [sys.executable, "-c", BENCH_SERVE]
    subprocess.run([*command, *where, *tokenizer, *data, *load, *result], check=True)
    told = json.loads((tmp_path / "result.json").read_text())
    for name in ("completed", "failed", "total_output_tokens"):
        record_property(name, told[name])
    assert told["completed"] == 24
