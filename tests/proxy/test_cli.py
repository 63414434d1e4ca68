"""`pd-proxy`'s command line."""

import json
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from engines.base import NodeRole
from proxy.cli import _join_bootstrap_ports, _with_bootstrap
from tests.processes import ROOT, Proxy, free_port, http, proxy_in_front_of, running, sim_node, wait_until

PD_PROXY = (sys.executable, "-P", "-m", "proxy.cli")


def test_the_flags_of_vllms_example_proxy_mean_the_same_here() -> None:
    args = ["--prefill", "http://a:1", "9000", "--prefill", "http://b:2", "none", "--prefill", "http://c:3",
            "--decode", "http://d:4", "--port", "80"]  # fmt: skip
    joined = _join_bootstrap_ports(args)
    values = [value for flag, value in pairwise(joined) if flag == "--prefill"]
    assert [node.bootstrap for node in _with_bootstrap(NodeRole.PREFILL, values)] == [
        "http://a:9000",
        "http://b:8998",
        "http://c:8998",
    ]
    assert joined[-4:] == args[-4:]


def test_an_ipv6_prefill_node_has_a_bracketed_bootstrap() -> None:
    assert _with_bootstrap(NodeRole.PREFILL, ["http://[fd00::1]:8100 8998"])[0].bootstrap == "http://[fd00::1]:8998"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "which nodes?"),
        (["--prefill", "http://127.0.0.1:1"], "which nodes?"),
        (["--prefill", "ftp://x", "--decode", "http://y:1"], "not of the form"),
        (["--prefill", "http://x:1", "--decode", "http://y:1/v1"], "leave the rest away"),
        (["--prefill", "http://x:1", "--decode", "http://x:1"], "more than one node has the url"),
        (["--topology", "/no/such/file"], "cannot read the topology /no/such/file"),
        (["--topology", "x", "--prefill", "http://x:1", "--decode", "http://y:1"], "not from both"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(flags: list[str], says: str) -> None:
    result = subprocess.run([*PD_PROXY, *flags], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def write(file: Path, *nodes: Mapping[str, str | None]) -> None:
    unfinished = file.with_suffix(".new")
    unfinished.write_text(json.dumps({"nodes": nodes}))
    unfinished.rename(file)


def test_a_topology_file_is_followed_and_one_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    with sim_node("prefill") as prefill, sim_node("decode") as one, sim_node("decode") as other:
        p = {"name": "p", "role": "prefill", "url": prefill.url, "bootstrap": prefill.bootstrap}
        d1 = {"name": "d1", "role": "decode", "url": one.url}
        d2 = {"name": "d2", "role": "decode", "url": other.url}
        write(file, p, d1)
        port = free_port()
        with running([*PD_PROXY, "--topology", str(file), "--port", str(port)]) as process:
            proxy = Proxy(f"http://127.0.0.1:{port}", process)
            wait_until(lambda: proxy.health()["status"] == "ok", "the first topology")
            write(file, p, d2)
            wait_until(lambda: [n["name"] for n in proxy.health()["nodes"]] == ["p", "d2"], "the second one")
            proxy.until_usable(2)
            file.write_text("{ half a fi")
            answer = http.post(f"{proxy.url}/v1/completions", json={"prompt": "hello"})
            assert answer.is_success
            assert [n["name"] for n in proxy.health()["nodes"]] == ["p", "d2"]
            assert len(other.received()) == 1


def test_sigterm_ends_it_with_exit_code_0() -> None:
    with sim_node("prefill") as prefill, sim_node("decode") as decode, proxy_in_front_of(prefill, decode) as proxy:
        proxy.process.terminate()
        assert proxy.process.wait(timeout=30) in (0, -15)


def test_one_node_cannot_hand_over_to_itself() -> None:
    found = subprocess.run(
        [*PD_PROXY, "--both", "http://a:1", "2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "--both at least twice" in found.stderr
