"""From configuration and facts to everything that will be started."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import NodeRole, Role
from launcher.errors import ConfigError, PortBusyError
from launcher.plan.config import load
from launcher.plan.facts import HostFacts
from launcher.plan.plan import Plan
from launcher.plan.planner import another_node, make_plan, moved_node
from launcher.plan.render.shell import script
from tests.machines import machine

FACTS = machine()
H100 = machine("8xh100-8hca")


def plan(facts: HostFacts = FACTS, **flags: Any) -> Plan:
    return make_plan(load({"model": "tiny", **flags}), facts)


def environment(made: Plan, node: int = 0) -> dict[str, str]:
    return made.nodes[node].inherited | made.nodes[node].environment


def kv_config(command: tuple[str, ...]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(command[command.index("--kv-transfer-config") + 1])
    return config


def test_tcp_means_tcp_also_where_an_adapter_is() -> None:
    """Mooncake's engine finds adapters by itself, whatever protocol it is given."""
    assert environment(plan(H100, device="cuda", transfer_protocol="tcp"))["MC_FORCE_TCP"] == "1"
    assert "MC_FORCE_TCP" not in environment(plan(H100, device="cuda"))


SHELL = {
    "PD_PROXY_API_KEYS": "clients", "PD_PROXY_ADMIN_KEY": "admin", "PD_NODE_API_KEY": "nodes", "VLLM_API_KEY": "stray",
    "VLLM_PORT": "tcp://10.0.0.1:80", "VLLM_USE_V1": "1", "MY_SECRET": "mine", "PYTHONPATH": "/somewhere",
    "HF_HOME": "/models", "NCCL_DEBUG": "INFO", "PATH": "/usr/bin", "VLLM_LOGGING_LEVEL": "DEBUG",
}  # fmt: skip


def test_an_engine_inherits_what_engines_know_and_no_key_and_nothing_by_accident() -> None:
    made = plan(machine(environment=SHELL))
    assert made.nodes[0].inherited == {name: SHELL[name] for name in ("HF_HOME", "NCCL_DEBUG", "VLLM_LOGGING_LEVEL")}
    beside = Path(made.engine_python).parent
    assert made.nodes[0].environment["PATH"] == f"{beside}:/usr/bin"
    passed = {name for name in made.proxy.inherited if name.startswith("PD_")}
    assert passed == {"PD_PROXY_API_KEYS", "PD_PROXY_ADMIN_KEY", "PD_NODE_API_KEY"}
    assert "HF_HOME" not in made.proxy.inherited


def test_env_sets_what_is_never_inherited_and_passes_on_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PLUGIN_MODE", "fast")
    made = plan(machine(environment=SHELL), env=["VLLM_API_KEY=mine", "MY_PLUGIN_MODE"])
    assert made.nodes[0].environment["VLLM_API_KEY"] == "mine"
    assert made.nodes[0].environment["MY_PLUGIN_MODE"] == "fast"


def test_a_variable_of_one_node_is_that_nodes_only_and_goes_before_the_others() -> None:
    made = plan(env=["A=all", "NCCL_DEBUG=WARN"], node_env=["decode-0=A=mine"])
    assert [node.environment["A"] for node in made.nodes] == ["all", "mine"]


def test_what_the_user_keeps_from_the_http_proxy_stays_kept_from_it() -> None:
    made = plan(machine(environment={"NO_PROXY": "hf.corp.example,10.0.0.0/8"}))
    for name in ("NO_PROXY", "no_proxy"):
        assert environment(made)[name] == "127.0.0.1,127.0.0.1,localhost,hf.corp.example,10.0.0.0/8"


def test_a_name_of_a_host_is_resolved_once() -> None:
    made = plan(machine(addresses={"gpu01.example": "10.0.0.1"}), host="gpu01.example")
    assert environment(made)["VLLM_HOST_IP"] == "10.0.0.1"
    assert made.nodes[0].url.startswith("http://10.0.0.1:")


@pytest.mark.parametrize(
    ("args", "seconds"),
    [
        ([], 40),
        (["--shutdown-grace-s", "100"], 110),
        (["--shutdown-grace-s=100", "--shutdown-delay-s", "5"], 115),
        (["--shutdown-grace-s", "soon"], 40),
    ],
)
def test_the_proxy_may_take_as_long_to_stop_as_it_lets_answers_run(args: list[str], seconds: float) -> None:
    assert plan(proxy_args=args).proxy.stops_within_s == seconds


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["vllm", "sim"]))
def test_no_two_children_share_a_port(prefill: int, decode: int, engine: str) -> None:
    made = plan(prefill=prefill, decode=decode, engine=engine)
    ports = [n for child in made.processes for port in child.ports for n in range(port.first, port.last + 1)]
    assert Counter(ports).most_common(1)[0][1] == 1
    assert [node.role for node in made.nodes] == [NodeRole.PREFILL] * prefill + [NodeRole.DECODE] * decode


def test_the_same_configuration_is_the_same_plan() -> None:
    assert plan(prefill=2) == plan(prefill=2)


def test_taken_ports_are_passed_over_and_said() -> None:
    taken = {8100: "pid 1", 8900: "pid 2", 20003: "pid 3"} | dict.fromkeys(range(20016, 20032), "pid 4")
    made = plan(machine(taken=taken))
    assert [node.url for node in made.nodes] == ["http://127.0.0.1:8101", "http://127.0.0.1:8102"]
    assert made.nodes[0].bootstrap == "http://127.0.0.1:8901"
    slices = [str(port) for node in made.nodes for port in node.ports if port.purpose == "transfer"]
    assert slices == ["20000-20015", "20032-20047"], "a transfer engine can do with some ports of its slice"
    assert any("port 8100 passed over, 8100 is taken by pid 1" in line for line in made.passed_over)
    assert len(made.passed_over) == 3


def test_a_range_without_a_free_port_names_who_has_them() -> None:
    taken = dict.fromkeys(range(8100, 8104), "pid 4711")
    with pytest.raises(PortBusyError, match="8103 is taken by pid 4711") as error:
        plan(machine(taken=taken), http_ports="8100-8104")
    assert "--http-ports" in error.value.hint


def test_a_further_node_gets_a_free_name_free_ports_and_free_devices() -> None:
    config = load({"model": "m", "device": "cuda", "devices": "0,1,2", "decode": 2})
    made = make_plan(config, FACTS)
    smaller = made.without("decode-0")
    taken = {port: "us" for node in made.nodes for port in (node.seat.http_port, *range(*node.seat.transfer_ports))}
    new = another_node(smaller, config, machine(taken=taken), NodeRole.DECODE)
    assert (new.name, new.devices, new.url) == ("decode-0", ("1",), "http://127.0.0.1:8103")
    with pytest.raises(ConfigError, match="no device is left"):
        another_node(made, config, FACTS, NodeRole.PREFILL)


def test_a_node_that_moves_keeps_its_name_and_devices() -> None:
    config = load({"model": "m", "device": "cuda", "devices": "0,1"})
    made = make_plan(config, FACTS)
    moved = moved_node(made, config, machine(taken={8100: "a thief", 8101: "us"}), made.nodes[0])
    assert (moved.name, moved.devices, moved.url) == ("prefill-0", ("0",), "http://127.0.0.1:8102")
    assert made.with_node(moved).nodes == (moved, made.nodes[1])


def test_the_proxy_gives_a_hand_off_up_before_the_engines_do() -> None:
    command = plan(transfer_timeout_s=30).proxy.command
    assert command[command.index("--decode-start-timeout-s") + 1] == "25"


def test_a_prefill_node_is_told_its_ports_and_a_decode_node_has_no_bootstrap() -> None:
    prefill, decode = plan().nodes
    assert prefill.environment["VLLM_MOONCAKE_BOOTSTRAP_PORT"] == "8900"
    assert prefill.bootstrap == "http://127.0.0.1:8900"
    assert (prefill.environment["MC_MIN_RPC_PORT"], prefill.environment["MC_MAX_RPC_PORT"]) == ("20000", "20015")
    assert (decode.environment["MC_MIN_RPC_PORT"], decode.environment["MC_MAX_RPC_PORT"]) == ("20016", "20031")
    assert "VLLM_MOONCAKE_BOOTSTRAP_PORT" not in decode.environment
    assert {port.purpose for port in decode.ports} == {"api", "transfer"}


def test_nodes_that_do_both_hold_and_pull_have_bootstrap_servers_and_no_prefix_cache_over_tcp() -> None:
    made = plan(both=2)
    assert [(node.name, node.role) for node in made.nodes] == [("both-0", "both"), ("both-1", "both")]
    assert [node.bootstrap for node in made.nodes] == ["http://127.0.0.1:8900", "http://127.0.0.1:8901"]
    for node in made.nodes:
        assert kv_config(node.command)["kv_role"] == "kv_both"
        assert "--no-enable-prefix-caching" in node.command
        assert node.environment["VLLM_MOONCAKE_BOOTSTRAP_PORT"] == str(node.seat.bootstrap_port)
    assert made.of(Role.PREFILL) == made.of(Role.DECODE) == made.nodes


def test_nodes_that_do_both_stand_beside_those_of_one_role() -> None:
    made = plan(both=1, prefill=1, decode=1, prefill_args=["--max-num-seqs=7"])
    assert [node.role for node in made.nodes] == ["prefill", "decode", "both"]
    assert ["--max-num-seqs=7" in node.command for node in made.nodes] == [True, False, False]
    assert [node.name for node in made.topology().of(Role.PREFILL)] == ["prefill-0", "both-0"]


def test_every_port_is_checked_on_the_address_that_will_be_bound() -> None:
    binds = {port.purpose: port.bind for port in plan(host="10.0.0.1", proxy_host="10.0.0.2").nodes[0].ports}
    assert binds == {"api": "10.0.0.1", "bootstrap": "0.0.0.0", "transfer": "0.0.0.0"}
    assert plan(proxy_host="10.0.0.2").proxy.ports[0].bind == "10.0.0.2"


def test_safe_defaults_are_in_every_nodes_plan() -> None:
    for node in plan().nodes:
        assert node.environment["VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT"] == "60"
        assert node.environment["VLLM_HOST_IP"] == "127.0.0.1"
        assert kv_config(node.command)["kv_load_failure_policy"] == "recompute"
        assert node.command[node.command.index("--host") + 1] == "127.0.0.1"


def test_on_a_cpu_the_plug_in_is_loaded_and_on_gpus_it_is_not() -> None:
    cpu = plan().nodes[0]
    assert kv_config(cpu.command)["kv_connector"] == "CpuMooncakeConnector"
    assert cpu.environment["PYTHONPATH"] == "/ours/engines/plugins"
    gpu = plan(H100, model="Qwen/Qwen3-8B", device="cuda", devices="0,1").nodes
    assert kv_config(gpu[0].command)["kv_connector"] == "MooncakeConnector"
    assert "PYTHONPATH" not in gpu[0].environment
    assert [node.environment["CUDA_VISIBLE_DEVICES"] for node in gpu] == ["0", "1"]
    assert {node.environment["CUDA_DEVICE_ORDER"] for node in gpu} == {"PCI_BUS_ID"}


def test_devices_are_shared_out_evenly_and_slices_grow_with_them() -> None:
    made = plan(device="cuda", devices="0,1,2,3")
    assert [node.devices for node in made.nodes] == [("0", "1"), ("2", "3")]
    assert [str(port) for node in made.nodes for port in node.ports if port.purpose == "transfer"] == [
        "20000-20031",
        "20032-20063",
    ]


@pytest.mark.parametrize(
    ("name", "device", "asked", "used", "why"),
    [
        ("8xh100-8hca", "cuda", "auto", "rdma", "mlx5_0, mlx5_1, mlx5_2, .* mlx5_7 can be used"),
        ("8xh100-8hca", "cpu", "auto", "tcp", "engines on a CPU"),
        ("8xh100-8hca", "cuda", "tcp", "tcp", "asked for"),
        ("laptop", "cuda", "auto", "tcp", "no RDMA adapter is here"),
        ("efa", "cuda", "auto", "tcp", "rdmap0s27 is an EFA adapter"),
        ("hca-down", "cuda", "auto", "tcp", "no port of mlx5_0 is ACTIVE"),
        ("container-gpus-2-3", "cuda", "auto", "tcp", "/dev/infiniband/uverbs. is not there"),
    ],
)
def test_the_transfer_protocol_follows_what_can_be_used_unless_it_is_named(
    name: str, device: str, asked: str, used: str, why: str
) -> None:
    made = plan(machine(name), device=device, transfer_protocol=asked)
    assert kv_config(made.nodes[0].command)["kv_connector_extra_config"]["mooncake_protocol"] == used
    assert re.search(why, made.protocol_why)


def test_rdma_locks_memory_and_a_limit_rules_it_out() -> None:
    made = plan(machine("8xh100-8hca", locked_memory_kib=64), device="cuda")
    assert (made.protocol, made.protocol_why) == (
        "tcp",
        "only 64 KiB may be locked (ulimit -l), and RDMA locks the whole KV cache",
    )


def test_the_adapters_of_a_node_are_named_to_its_connector() -> None:
    made = plan(H100, device="cuda", rdma_devices=["mlx5_0,mlx5_1", "decode-0=mlx5_4"])
    named = [kv_config(node.command)["kv_connector_extra_config"]["device_name"] for node in made.nodes]
    assert named == ["mlx5_0,mlx5_1", "mlx5_4"]
    assert "device_name" not in kv_config(plan(H100, device="cuda").nodes[0].command)["kv_connector_extra_config"]


@pytest.mark.parametrize(
    ("flags", "shell", "fetched"),
    [
        ({"model": "Qwen/Qwen3-8B"}, {}, "Qwen/Qwen3-8B"),
        ({"model": "Qwen/Qwen3-8B", "args": ["--revision", "main"]}, {}, "Qwen/Qwen3-8B@main"),
        ({"model": "Qwen/Qwen3-8B"}, {"HF_HUB_OFFLINE": "1"}, None),
        ({"model": "Qwen/Qwen3-8B", "args": ["--load-format=dummy"]}, {}, None),
        ({"model": "Qwen/Qwen3-8B", "engine": "sim"}, {}, None),
        ({"model": "s3://bucket/model"}, {}, None),
        ({"model": "/models/here"}, {}, None),
        ({"model": "tiny"}, {}, None),
    ],
)
def test_a_model_of_the_hub_is_fetched_before_anything_starts(
    flags: dict[str, Any], shell: dict[str, str], fetched: str | None
) -> None:
    download = plan(machine(environment=shell), **flags).download
    told = None if download is None else "@".join(filter(None, (download.model, download.revision)))
    assert told == fetched


@pytest.mark.parametrize(
    ("model", "argument", "served"),
    [("tiny", "/cache/models/tiny", "tiny"), ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
     ("/models/my-llama", "/models/my-llama", "my-llama")],
)  # fmt: skip
def test_a_model_is_a_path_a_name_or_the_tiny_one(model: str, argument: str, served: str) -> None:
    command = plan(model=model).nodes[0].command
    assert command[command.index("--model") + 1] == argument
    assert command[command.index("--served-model-name") + 1] == served


def test_further_flags_and_variables_reach_their_nodes() -> None:
    prefill, decode = plan(
        args=["--block-size", "32"], decode_args=["--max-num-seqs", "8"], env=["A=b"], max_model_len=512
    ).nodes
    assert prefill.command[-2:] == ("--block-size", "32")
    assert decode.command[-4:] == ("--block-size", "32", "--max-num-seqs", "8")
    assert prefill.environment["A"] == decode.environment["A"] == "b"
    assert decode.command[decode.command.index("--max-model-len") + 1] == "512"


def test_the_simulator_takes_the_same_command_line() -> None:
    made = plan(engine="sim")
    assert made.nodes[0].command[:4] == ("/ours/python", "-P", "-m", "engines.sim")
    assert "--kv-transfer-config" in made.nodes[0].command
    assert "transfer" not in {port.purpose for port in made.nodes[0].ports}


def test_the_topology_is_what_the_nodes_will_be() -> None:
    topology = plan(prefill=2).topology()
    assert [(node.name, node.url, node.bootstrap) for node in topology.nodes] == [
        ("prefill-0", "http://127.0.0.1:8100", "http://127.0.0.1:8900"),
        ("prefill-1", "http://127.0.0.1:8101", "http://127.0.0.1:8901"),
        ("decode-0", "http://127.0.0.1:8102", None),
    ]


def test_a_sockets_path_in_the_temporary_folder_fits_the_kernels_limit() -> None:
    made = plan(run_dir="/a/very/long/" + "x" * 200)
    assert len(str(made.temporary / "prefill-11" / ("u" * 36))) <= 107


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"prefill": 2, "http_ports": "8100-8101"}, "--http-ports 8100-8101 has 2 ports, .* need 3"),
        ({"prefill": 2, "bootstrap_ports": "8900"}, "--bootstrap-ports 8900-8900 has 1 ports, .* need 2"),
        ({"transfer_ports": "20000-20020"}, "--transfer-ports 20000-20020 has 21 ports, .* need 32"),
        ({"bootstrap_ports": "8150-8160"}, "--http-ports 8100-8199 and --bootstrap-ports 8150-8160 overlap"),
        ({"proxy_port": 8105}, "--http-ports 8100-8199 and --proxy-port 8105-8105 overlap"),
        ({"connector": "MultiConnector", "transfer_ports_per_node": 4}, "per-node 4: the MultiConnector needs 6"),
        ({"transfer_ports": "1000-2000"}, "reaches into 0-1023, which Mooncake does not take"),
        ({"device": "cuda", "devices": "0,1,2"}, "3 devices cannot be shared out evenly to 2 nodes"),
    ],
)
def test_what_cannot_be_carried_out_is_said_before_anything_starts(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(**flags)


def test_a_range_that_nothing_uses_may_be_anywhere() -> None:
    assert plan(store_ports="8100-8101").nodes[0].seat.http_port == 8100


def test_with_a_store_its_master_is_started_first_and_every_node_is_told_of_it() -> None:
    made = plan(connector="MooncakeStoreConnector")
    (store,) = made.services
    assert store.command[0] == "/cache/engine/bin/mooncake_master"
    assert [(str(port), port.bind) for port in store.ports] == [("8700", "127.0.0.1"), ("8701", "0.0.0.0")]
    assert made.processes[0] == store
    assert json.loads(made.files["mooncake.json"])["master_server_address"] == "127.0.0.1:8700"
    for node in made.nodes:
        assert kv_config(node.command)["kv_connector"] == "CpuMooncakeStoreConnector"
        assert node.environment["MOONCAKE_CONFIG_PATH"] == "/state/runs/now/mooncake.json"
        assert node.environment["PYTHONHASHSEED"] == "0"
        assert node.bootstrap is None
    slices = [str(port) for node in made.nodes for port in node.ports if port.purpose == "store client"]
    assert slices == ["28000-28031", "28032-28063"]
    assert made.topology().connector == "MooncakeStoreConnector"


def test_without_a_store_there_is_no_service_and_no_file() -> None:
    assert (plan().services, plan().files) == ((), {})


def test_both_connectors_together_have_a_store_a_bootstrap_and_a_child_that_is_counted() -> None:
    for device, child in (("cpu", "CpuMooncakeConnector"), ("cuda", "CountedMooncakeConnector")):
        made = plan(connector="MultiConnector", device=device, model="m")
        prefill, decode = (kv_config(node.command) for node in made.nodes)
        children = prefill["kv_connector_extra_config"]["connectors"]
        assert children[0]["kv_connector"] == child
        assert [one["kv_role"] for one in children] == ["kv_producer", "kv_both"]
        assert decode["kv_role"] == "kv_consumer"
        assert made.nodes[0].bootstrap
        assert made.nodes[0].environment["PYTHONPATH"] == "/ours/engines/plugins"
        assert [service.name for service in made.services] == ["store"]


def test_one_node_can_have_flags_of_its_own() -> None:
    made = plan(decode=2, decode_args=["--a"], node_args=["decode-1=--b=c", "decode-1=d"])
    assert [node.command[-3:] for node in made.nodes[1:]] == [made.nodes[1].command[-3:], ("--a", "--b=c", "d")]
    assert made.nodes[1].command[-1] == "--a"
    for wrong in ("--b", "decode=--b", "decode-1=--port=1"):
        with pytest.raises(ConfigError, match="node_args"):
            plan(node_args=[wrong])


def test_a_slice_knows_how_many_of_its_ports_must_be_free() -> None:
    def needed(**flags: Any) -> dict[str, int]:
        return {port.purpose: port.needed for port in plan(**flags).nodes[0].ports}

    assert needed() == {"api": 1, "bootstrap": 1, "transfer": 4}
    assert needed(connector="MultiConnector") == {"api": 1, "bootstrap": 1, "transfer": 6, "store client": 3}
    assert needed(device="cuda", devices="0,1,2,3")["transfer"] == 6


def test_a_plan_that_is_shown_has_no_secret_in_it() -> None:
    secrets: dict[str, Any] = {
        "env": ["HF_TOKEN=hidden", "TOKENIZERS_PARALLELISM=shown"],
        "args": ["--api-key", "hidden", "--seed=1"],
    }
    made = plan(machine(environment=SHELL | {"HF_TOKEN": "hidden"}), **secrets, decode_args=["--api-key=hidden"])
    assert "hidden" in made.as_json()
    for text in (made.without_secrets().as_json(), script(made)):
        assert "hidden" not in text
        assert "TOKENIZERS_PARALLELISM" in text
        assert "--seed=1" in text
    assert ': "${API_KEY:?}"\n: "${HF_TOKEN:?}"\n' in script(made)
    assert '  HF_TOKEN="$HF_TOKEN" \\' in script(made)
    assert '--api-key "$API_KEY"' in script(made)
