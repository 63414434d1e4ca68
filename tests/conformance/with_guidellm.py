"""guidellm, as users measure with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Keep = Callable[[str, object], None]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_every_request_is_answered_whole(tmp_path: Path, record_property: Keep, route: str) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "guidellm", "run", "--disable-progress"]
    command += ["--backend", f"kind=openai_http,target={os.environ['PD_URL']},model=tiny,request_format={route}"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=24"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"]
    command += ["--tokenizer", f"kind=hf_auto,model={os.environ['PD_TOKENIZER']}"]
    subprocess.run([*command, "--output", f"kind=json,path={report}"], check=True)
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    for name in ("successful", "errored", "incomplete"):
        record_property(name, totals[name])
    assert totals["errored"] == 0
