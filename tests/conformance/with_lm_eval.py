"""lm-eval's `local-completions`: log probabilities of given text (echo), perplexity, generation; with local tasks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TASKS = Path(__file__).parent / "tasks"
Keep = Callable[[str, object], None]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("task", ["pd_choice", "pd_perplexity", "pd_generate"])
def test_scores(tmp_path: Path, record_property: Keep, task: str, batch: int) -> None:
    model = f"model=tiny,base_url={os.environ['PD_URL']}/v1/completions,tokenizer={os.environ['PD_TOKENIZER']}"
    model += ",num_concurrent=4,max_retries=1,tokenized_requests=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
    command += [
        "--tasks",
        task,
        "--include_path",
        str(TASKS),
        "--batch_size",
        str(batch),
        "--output_path",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, cwd=TASKS)
    results = json.loads(next(tmp_path.rglob("results*.json")).read_text())["results"][task]
    for name, value in results.items():
        if "stderr" not in name and isinstance(value, float):
            record_property(name, round(value, 3))
