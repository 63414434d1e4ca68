"""Which GPUs each node gets, on machines that are not here."""

from typing import Any

import pytest

from engines.base import NodeRole
from launcher.errors import ConfigError
from launcher.plan.config import load
from launcher.plan.plan import Plan
from launcher.plan.planner import another_node, make_plan
from tests.machines import machine


def plan(name: str = "8xh100-8hca", **flags: Any) -> Plan:
    return make_plan(load({"model": "m", "device": "cuda", **flags}), machine(name))


def shared_out(name: str = "8xh100-8hca", **flags: Any) -> list[str]:
    return [node.environment["CUDA_VISIBLE_DEVICES"] for node in plan(name, **flags).nodes]


def test_each_node_has_a_gpu_of_its_own_unless_told_otherwise() -> None:
    assert shared_out(prefill=1, decode=2) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"devices": "0,1,2,3"}, ["0,1", "2,3"]),
        ({"devices": "3,1"}, ["3", "1"]),
        ({"devices": "0,0", "args": ["--gpu-memory-utilization=0.4"]}, ["0", "0"]),
        ({"tensor_parallel": "2"}, ["0,1", "2,3"]),
        ({"tensor_parallel": "prefill=1,decode=2"}, ["0", "1,2"]),
        ({"tensor_parallel": "prefill=2,decode=4", "devices": "7,6,5,4,3,2,1,0"}, ["7,6", "5,4,3,2"]),
        ({"prefill": 2, "prefill_devices": "0,1", "decode_devices": "2,3,4,5"}, ["0", "1", "2,3,4,5"]),
        ({"pipeline_parallel": "2", "devices": "0,1,2,3"}, ["0,1", "2,3"]),
        ({"data_parallel": "decode=4"}, ["0", "1,2,3,4"]),
        ({"data_parallel": "2", "tensor_parallel": "2"}, ["0,1,2,3", "4,5,6,7"]),
    ],
)
def test_gpus_are_shared_out_as_they_are_asked_for(flags: dict[str, Any], expected: list[str]) -> None:
    assert shared_out(**flags) == expected


def test_sizes_reach_the_engines_flags_the_ports_and_the_seats() -> None:
    prefill, decode = plan(tensor_parallel="2", data_parallel="decode=2").nodes
    assert prefill.command[prefill.command.index("--tensor-parallel-size") + 1] == "2"
    assert "--data-parallel-size" not in prefill.command
    assert decode.command[decode.command.index("--data-parallel-size") + 1] == "2"
    slices = [port for node in (prefill, decode) for port in node.ports if port.purpose == "transfer"]
    assert [(len(port.numbers), port.needed) for port in slices] == [(32, 6), (64, 10)]
    assert decode.seat.parallel.workers == 4


def test_a_nodes_share_is_tensor_parallelism_unless_other_sizes_need_it() -> None:
    seats = [node.seat for node in plan(devices="0,1,2,3,4,5,6,7", pipeline_parallel="2").nodes]
    assert [(seat.tensor, seat.pipeline) for seat in seats] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "devices", "expected"),
    [
        ("container-gpus-2-3", "0,1", ["0", "1"]),
        ("container-gpus-2-3", "GPU-00000003,GPU-00000002", ["1", "0"]),
        ("slurm-step", "0,1", ["4", "5"]),
        ("slurm-step", "", ["4", "5"]),
        ("slurm-step-uuids", "0,1", ["6", "2"]),
        ("slurm-step-uuids", "GPU-00000002", None),
        ("mig", "0,1", ["MIG-00000000-aaaa-bbbb-cccc-dddddddddddd", "MIG-00000001-aaaa-bbbb-cccc-dddddddddddd"]),
        ("busy-gpus", "", ["0", "1"]),
        ("laptop", "", ["0", "1"]),
        ("laptop", "GPU-x,GPU-y", ["GPU-x", "GPU-y"]),
    ],
)
def test_a_device_is_meant_as_cuda_would_number_it_here(name: str, devices: str, expected: list[str] | None) -> None:
    """In a Slurm step that was given GPUs 4 and 5, `--devices 0` is GPU 4, as it is for torch."""
    if expected is None:
        with pytest.raises(ConfigError, match="1 devices cannot be shared out"):
            shared_out(name, devices=devices)
    else:
        assert shared_out(name, devices=devices) == expected


@pytest.mark.parametrize(
    ("name", "flags", "says", "hint"),
    [
        ("container-gpus-2-3", {"devices": "2,3"}, "--devices 2: no such GPU here", "0: GPU-00000002-1111"),
        ("slurm-step", {"devices": "4,5"}, "--devices 4: no such GPU here", "CUDA_VISIBLE_DEVICES=4,5 of this shell"),
        ("8xh100-8hca", {"devices": "GPU-0000000,1"}, "GPU-0000000: no such GPU", "7: GPU-00000007"),
        ("8xh100-8hca", {"prefill": 8}, "need 9 GPUs, and 8 can be used here", ""),
        ("busy-gpus", {"decode": 2}, r"need 3 GPUs, and 2 can be used here \(1 are kept by another pd-launch\)", ""),
        ("wsl2", {}, "need 2 GPUs, and 1 can be used here", "name one twice"),
        ("8xh100-8hca", {"devices": "0,1,2"}, "3 devices cannot be shared out evenly to 2 nodes", "--prefill-devices"),
        ("8xh100-8hca", {"devices": "0,1", "tensor_parallel": "2"}, "need 4 GPUs, and --devices names 2", ""),
        ("8xh100-8hca", {"devices": "0,1,2,3", "pipeline_parallel": "3"}, "2 GPUs cannot be shared out to 3", ""),
        ("8xh100-8hca", {"prefill": 2, "prefill_devices": "0,1,2", "decode_devices": "3"}, "evenly to 2 prefill", ""),
        ("8xh100-8hca", {"devices": "0,0,1,1"}, "GPU 0 would be given to one node twice", ""),
        (
            "8xh100-8hca",
            {"prefill_devices": "0,1", "decode_devices": "3", "tensor_parallel": "4"},
            "gives a prefill node 2 GPUs, and its parallel sizes need 4",
            "",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_said_before_anything_starts(
    name: str, flags: dict[str, Any], says: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        plan(name, **flags)
    assert hint in error.value.hint


def test_a_further_node_gets_gpus_that_no_other_has() -> None:
    config = load({"model": "m", "device": "cuda", "decode": 2, "tensor_parallel": "2"})
    facts = machine("8xh100-8hca")
    made = make_plan(config, facts)
    fourth = another_node(made, config, facts, NodeRole.DECODE)
    assert (fourth.name, fourth.devices) == ("decode-2", ("6", "7"))
    with pytest.raises(ConfigError, match="every one of 8 GPUs here is in use"):
        another_node(made.with_node(fourth), config, facts, NodeRole.PREFILL)


def test_a_further_node_of_a_run_that_keeps_its_gpus_itself_gets_others() -> None:
    """The launcher's own locks are among those that are seen."""
    config = load({"model": "m", "device": "cuda"})
    facts = machine("8xh100-8hca")
    made = make_plan(config, facts)
    mine = {gpu.uuid: "another pd-launch" for gpu in facts.gpus[:2]}
    assert another_node(made, config, facts.model_copy(update={"locked_gpus": mine}), NodeRole.DECODE).devices == ("2",)


def test_on_a_cpu_sizes_are_sizes_and_there_are_no_devices() -> None:
    made = make_plan(load({"model": "m", "tensor_parallel": "2"}), machine())
    assert [(node.devices, node.seat.tensor) for node in made.nodes] == [((), 2), ((), 2)]
    assert "CUDA_VISIBLE_DEVICES" not in made.nodes[0].environment
