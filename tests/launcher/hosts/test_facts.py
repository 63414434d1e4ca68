"""What is found out about this machine; where something is missing or absurd, that is a fact too."""

import os
import pwd
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.hosts.local import facts as gathering
from launcher.hosts.local import gpus, locks, rdma
from launcher.hosts.local.facts import gather
from launcher.plan.config import load
from launcher.plan.facts import Gpu, HostFacts
from tests.launched import own_ports

SIM = {"model": "tiny", "engine": "sim"}


def of_this_machine(**flags: Any) -> HostFacts:
    words = own_ports(2)
    ports = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    return gather(load({**SIM, **ports, **flags}))


def test_the_facts_of_this_machine_can_be_told_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    found = of_this_machine()
    assert HostFacts.model_validate_json(found.model_dump_json()) == found
    assert found.our_python == sys.executable
    assert found.memory_available_mib > 0
    assert found.environment["HF_TOKEN"] == "canary"
    assert "canary" not in found.without_secrets().model_dump_json()
    assert "HF_TOKEN" in found.without_secrets().environment


def test_only_what_children_may_have_and_checks_look_at_is_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_OTHER_PROGRAMS", "business")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    found = of_this_machine().environment
    assert "SOME_OTHER_PROGRAMS" not in found
    assert found["NCCL_DEBUG"] == "INFO"


def test_who_has_no_name_here_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run -u 12345`: torch asks for a name, and would end with a KeyError."""

    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("USER", raising=False)
    monkeypatch.delenv("LOGNAME", raising=False)
    assert of_this_machine().environment["USER"] == "pd-launch"


@pytest.mark.parametrize(
    ("files", "left_mib"),
    [
        ({"memory.max": "4294967296", "memory.current": "1073741824"}, 3072),
        ({"memory.max": "max", "memory.current": "1073741824"}, None),
        ({"memory/memory.limit_in_bytes": "2147483648", "memory/memory.usage_in_bytes": "1073741824"}, 1024),
        ({"memory.max": "nonsense", "memory.current": ""}, None),
        ({"memory.max": "1024", "memory.current": "4096"}, 0),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left_mib: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gathering, "_CGROUP", tmp_path)
    found = of_this_machine().memory_available_mib
    assert found == left_mib if left_mib is not None else found > 0


def test_limits_of_this_user_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 512, resource.RLIMIT_MEMLOCK: 65536}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1, limits.get(kind, resource.RLIM_INFINITY)))
    monkeypatch.setattr(gathering, "_may_lock_all", lambda: False)
    found = of_this_machine()
    assert (found.open_files, found.locked_memory_kib) == (512, 64)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, resource.RLIM_INFINITY))
    found = of_this_machine()
    assert (found.open_files, found.locked_memory_kib) == (None, None)


@pytest.mark.parametrize(
    ("capabilities", "user_ids", "may"),
    [
        ("000001ffffffffff", "         0          0 4294967295", True),
        ("00000000a80425fb", "         0          0 4294967295", False),  # what Docker gives
        ("000001ffffffffff", "         0     100000      65536", False),  # root of a user namespace
    ],
)
def test_a_limit_of_locked_memory_does_not_count_for_who_may_lock_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, user_ids: str, *, may: bool
) -> None:
    (tmp_path / "status").write_text(f"Name:\tpython\nCapEff:\t{capabilities}\n")
    (tmp_path / "uid_map").write_text(f"{user_ids}\n")
    monkeypatch.setattr(gathering, "_SELF", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 65536))
    assert of_this_machine().locked_memory_kib == (None if may else 64)


def test_a_machine_without_the_usual_files_of_the_kernel_has_facts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gVisor, say: no port range, no list of Unix sockets."""
    monkeypatch.setattr(gathering, "_KERNEL", tmp_path)
    monkeypatch.setattr(gathering, "_SELF", tmp_path)
    monkeypatch.setattr(locks, "_UNIX_SOCKETS", tmp_path / "unix")
    found = of_this_machine(proxy_host="no..host")
    assert (found.ephemeral_ports, found.reserved_ports, found.addresses) == ((32768, 60999), (), {"no..host": ""})


def test_a_path_from_here_among_flags_and_variables_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jinja").write_text("")
    (tmp_path / "keys").mkdir()
    (tmp_path / "32").mkdir()
    args = ["--chat-template", "chat.jinja", "--max-num-seqs", "32", "--x", str(tmp_path / "chat.jinja"), "--y", "1.0"]
    found = of_this_machine(args=args, env=["A=./keys"], decode_args=["--z=keys/../chat.jinja"])
    assert sorted(found.relative_paths) == ["./keys", "chat.jinja", "keys/../chat.jinja"]


def test_a_folder_that_is_called_like_a_model_of_the_hub_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a Mistral folder has no config.json."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "params.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = of_this_machine(model="models/mine").model
    assert (found.path, found.is_folder, found.has_config) == (tmp_path / "models" / "mine", True, True)
    assert of_this_machine(model="models/other").model.path is None


def test_a_place_for_logs_is_looked_at_and_nothing_is_made_there(tmp_path: Path) -> None:
    assert of_this_machine(run_dir=str(tmp_path / "a" / "b")).run_dir_problem == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert of_this_machine(run_dir=str(tmp_path / "file" / "b")).run_dir_problem == f"{tmp_path}/file is no folder"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_no_place_for_logs(tmp_path: Path) -> None:
    """Who owns it can put a link to any file of ours in the place of a log."""
    os.chown(tmp_path, 65534, 65534)
    assert "it belongs to user 65534" in of_this_machine(run_dir=str(tmp_path)).run_dir_problem


def test_a_name_is_resolved_and_one_that_is_not_known_has_no_address() -> None:
    found = of_this_machine(host="localhost", proxy_host="no-such-host.invalid")
    assert found.addresses == {"localhost": "127.0.0.1", "no-such-host.invalid": ""}


def test_flags_that_the_proxy_does_not_take_are_told_in_its_own_words() -> None:
    assert of_this_machine(proxy_args=["--queue-timeout-s", "3"]).proxy_problem == ""
    assert "--fast" in of_this_machine(proxy_args=["--fast"]).proxy_problem
    assert "--queue-timeout-s" in of_this_machine(proxy_args=["--queue-timeout-s", "soon"]).proxy_problem


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ('{"num_attention_heads": 14, "num_key_value_heads": 2}', (True, 14, 2)),
        ('{"text_config": {"num_attention_heads": 8}}', (True, 8, None)),
        ('{"num_attention_heads": "many"}', (True, None, None)),
        ("[]", (True, None, None)),
        ("no json", (True, None, None)),
        (None, (False, None, None)),
    ],
)
def test_a_models_own_numbers_are_read_where_there_are_any(
    tmp_path: Path, config: str | None, model: tuple[bool, int | None, int | None]
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    found = of_this_machine(model=str(tmp_path)).model
    assert (found.has_config, found.attention_heads, found.kv_heads) == model


# -- devices, as data: no GPU and no adapter is here


class FakeNVML:
    """As much of pynvml as is used; `mig` devices are in the first GPU."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801, N818  NVML's own name
        pass

    def __init__(self, gpus: int, mig: int = 0, broken: str = "", lost: str = "", *, is_cut: bool = False) -> None:
        self._gpus, self._mig, self._broken, self._lost = gpus, mig, broken, lost
        self._is_cut = is_cut or mig > 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self._broken:
            raise self.NVMLError(self._broken)

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self._gpus

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:  # noqa: N802
        if self._lost == f"GPU-{number}":
            raise self.NVMLError("GPU is lost")
        return f"GPU-{number}"

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:  # noqa: N802
        if handle != "GPU-0":
            raise self.NVMLError("Not Supported")
        return int(self._is_cut), 0

    def nvmlDeviceGetMaxMigDeviceCount(self, _: str) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, _: str, place: int) -> str:  # noqa: N802
        if place >= self._mig:
            raise self.NVMLError_NotFound
        return f"MIG-{place}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        if self._lost == f"memory of {handle}":
            raise self.NVMLError("Not Supported")

        class Memory:
            total, free = 80 * 2**30, 79 * 2**30

        return Memory

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:  # noqa: N802
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return "an H100" if handle.startswith("GPU") else "an H100's part"

    def nvmlDeviceGetCudaComputeCapability(self, _: str) -> tuple[int, int]:  # noqa: N802
        return 9, 0

    def nvmlDeviceGetPciInfo(self, _: str) -> Any:  # noqa: N802
        raise self.NVMLError("Not Supported")


def seen(monkeypatch: pytest.MonkeyPatch, nvml: FakeNVML) -> gpus.Found:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return gpus.find()


def test_gpus_are_what_the_drivers_library_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, FakeNVML(gpus=2))
    assert [(gpu.id, gpu.uuid, gpu.name, gpu.capability) for gpu in found.gpus] == [
        ("0", "GPU-0", "an H100", "9.0"),
        ("1", "GPU-1", "an H100", "9.0"),
    ]
    assert (found.gpus[0].free_mib, found.driver, found.problem) == (79 * 1024, "580.95.05", "")


def test_of_a_gpu_that_is_cut_up_its_parts_are_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, FakeNVML(gpus=2, mig=2))
    assert [(gpu.id, gpu.is_mig) for gpu in found.gpus] == [("MIG-0", True), ("MIG-1", True), ("1", False)]


def test_a_gpu_that_is_cut_up_and_has_no_parts_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, FakeNVML(gpus=2, is_cut=True))
    assert [gpu.id for gpu in found.gpus] == ["1"]


def test_a_gpu_that_is_lost_takes_no_other_away(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, FakeNVML(gpus=2, lost="GPU-0"))
    assert ([gpu.id for gpu in found.gpus], found.problem) == (["1"], "")
    found = seen(monkeypatch, FakeNVML(gpus=1, lost="GPU-0"))
    assert found.problem.endswith("says of GPU 0: GPU is lost")


def test_a_gpu_that_shares_the_hosts_memory_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, FakeNVML(gpus=1, lost="memory of GPU-0"))
    assert [(gpu.id, gpu.memory_mib) for gpu in found.gpus] == [("0", 0)]


def test_why_no_gpu_is_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, FakeNVML(gpus=0)).problem == "the driver is here, and no GPU is passed in"
    broken = seen(monkeypatch, FakeNVML(gpus=1, broken="Driver/library version mismatch"))
    assert broken.problem.endswith("says: Driver/library version mismatch")
    assert broken.gpus == ()


def test_without_a_driver_the_real_library_says_so() -> None:
    """Or, on a machine that has GPUs, says which they are."""
    found = gpus.find()
    assert bool(found.gpus) != bool(found.problem)
    assert all(isinstance(gpu, Gpu) for gpu in found.gpus)


def test_adapters_are_read_from_sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / "class" / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text("InfiniBand\n")
        (tmp_path / "class" / name / "device").mkdir()
        (tmp_path / "class" / name / "device" / "numa_node").write_text("1\n" if name == "mlx5_0" else "-1\n")
    (tmp_path / "class" / "odd").mkdir()
    monkeypatch.setattr(rdma, "_CLASS", tmp_path / "class")
    monkeypatch.setattr(rdma, "_VERBS", tmp_path / "verbs")
    found = [(one.name, one.has_active_port, one.link_layer, one.numa_node) for one in rdma.adapters()]
    assert found == [("mlx5_0", True, "InfiniBand", 1), ("mlx5_1", False, "InfiniBand", None), ("odd", False, "", None)]
    assert not rdma.has_uverbs()
    (tmp_path / "verbs").mkdir()
    (tmp_path / "verbs" / "uverbs0").write_text("")
    assert rdma.has_uverbs()
