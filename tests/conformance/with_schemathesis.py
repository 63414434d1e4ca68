"""schemathesis makes requests from the engine's own schema, which every answer must fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize", "/detokenize"]
CHECKS = {
    "not_a_server_error": "ServerError",
    "status_code_conformance": "UndefinedStatusCode",
    "content_type_conformance": "UndefinedContentType",
    "response_schema_conformance": "JsonSchemaError",
}
"""And what a failure of each is called in the report."""


@pytest.fixture(scope="session")
def failures(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """Which check failed on which path."""
    report = tmp_path_factory.mktemp("schemathesis") / "report.json"
    command = [str(Path(sys.executable).with_name("st")), "run", os.environ["PD_SCHEMA"], "--url", os.environ["PD_URL"]]
    command += [word for path in PATHS for word in ("--include-path", path)]
    command += ["--checks", ",".join(CHECKS), "--continue-on-failure", "--suppress-health-check", "all"]
    command += ["--phases", "fuzzing", "--mode", "all", "--max-examples", "40", "--seed", "3", "--no-shrink"]
    command += ["--request-timeout", "120", "--report", "json", "--report-json-path", str(report)]
    subprocess.run(command, check=False, cwd=report.parent)
    told = json.loads(report.read_text())
    assert told["complete"]
    names = {kind for failure in told["failures"] if (kind := failure["type"]) not in CHECKS.values()}
    assert not names, "a failure of a kind that no check here is known for"
    return {(kind["type"], operation) for kind in told["failures"] for operation in kind["operations"]}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", PATHS)
def test_what_the_schema_allows_is_answered_as_it_says(failures: set[tuple[str, str]], path: str, check: str) -> None:
    assert (CHECKS[check], f"POST {path}") not in failures
