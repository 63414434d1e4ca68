"""The model is fetched before anything starts: the real client of the hub, and a hub that is made here."""

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import engines.plugins
from launcher.setup.environments import python_of
from tests.launched import own_ports, run_to_end

PROGRAM = Path(engines.plugins.__path__[0]) / "pd_model_download.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"the same weights once more" * 1000,
    "original/consolidated.00.pth": b"and again",
    "tokenizer.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """One model, `made/here`; `made/gated` and all others are refused as the hub refuses them."""

    asked: list[str]
    size_told: int | None = None

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self._file(with_body=True)
            return
        name = "/".join(self.path.removeprefix("/api/models/").split("?")[0].split("/")[:2])
        if name != "made/here":
            code = "GatedRepo" if name == "made/gated" else "RepoNotFound"
            self._answer(403 if code == "GatedRepo" else 404, b"{}", {"X-Error-Code": code})
        elif "/tree/" in self.path:
            listed = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in FILES.items()]
            self._answer(200, json.dumps(listed).encode())
        else:
            files = [{"rfilename": file, "size": self.size_told or len(data)} for file, data in FILES.items()]
            self._answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode())

    def _file(self, *, with_body: bool) -> None:
        self.asked.append(self.path)
        data = FILES[self.path.split(f"/resolve/{COMMIT}/")[1]]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._answer(200, data, headers, with_body=with_body)

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "x/y", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(size_told: int | None = None) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The variables by which it is found, and the files that were asked for."""
    asked: list[str] = []
    handler = type("OneHub", (Hub,), {"asked": asked, "size_told": size_told})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, asked
        finally:
            server.shutdown()


def fetched(model: str, variables: dict[str, str], home: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **variables, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [str(python_of("cpu")), str(PROGRAM), model], env=environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


def test_what_vllm_would_load_is_fetched_once_and_no_other_weights(tmp_path: Path) -> None:
    with hub() as (variables, asked):
        first = fetched("made/here", variables, tmp_path)
        assert first.returncode == 0, first.stderr
        (snapshot,) = tmp_path.glob("hub/models--made--here/snapshots/*")
        assert {path.name for path in snapshot.rglob("*")} == {
            "config.json", "model-00001-of-00001.safetensors", "tokenizer.json",
        }  # fmt: skip
        assert not any("pytorch_model.bin" in path or "original" in path for path in asked)
        asked.clear()
        assert fetched("made/here", variables, tmp_path).returncode == 0
        assert asked == [], "all of it is in the cache"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("made/gated", "made/gated is gated: accept its licence"),
        ("made/nowhere", "the hub knows no model made/nowhere"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(tmp_path: Path, model: str, says: str) -> None:
    with hub() as (variables, _):
        result = fetched(model, variables, tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(says)
    assert "Traceback" not in result.stderr


def test_a_model_that_does_not_fit_the_disk_is_not_begun(tmp_path: Path) -> None:
    with hub(size_told=2**50) as (variables, asked):
        result = fetched("made/here", variables, tmp_path)
    assert "GiB are free in" in result.stderr
    assert "set HF_HOME" in result.stderr
    assert asked == []


def test_up_says_that_the_hub_is_out_of_reach_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    result = run_to_end(["up", "--model", "made/here", "--run-dir", str(tmp_path / "run"), *own_ports(2)])
    assert result.returncode == 4, result.stdout + result.stderr
    assert "the model could not be fetched: cannot fetch made/here" in result.stderr
    assert "HF_HUB_OFFLINE=1" in result.stderr
    assert not (tmp_path / "run" / "prefill-0.log").exists()
