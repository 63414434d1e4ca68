"""Mooncake's KV connectors, made to run in a vLLM engine that has no accelerator.

Loaded by the engine through `kv_connector` + `kv_connector_module_path`, with this folder on its `PYTHONPATH`.
The transfer itself is untouched: the real TransferEngine moves real KV blocks over TCP.

vLLM 0.32 asks for the current accelerator before it starts the transfer engine (mooncake_connector.py, worker
`__init__`), which raises on a CPU build. There is one CPU device, so its index is 0. The store connector waits for
CUDA's stream with an event before it saves (store/worker.py, `wait_for_save`); a CPU has computed when it returns.

vLLM's attention uses AMX wherever the processor has it, but Linux wants to be asked first, once a process, and says no
when threads are there whose signal stacks are too small for it. With both connectors in one worker it was asked too
late, and the worker died of an illegal instruction (seen on a Sapphire Rapids). So it is asked here, before Mooncake's
libraries start theirs; and should it say no, vLLM is told that there is no AMX.
"""

import torch
from pd_counted_connector import CountedMooncakeConnector
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.connector import MooncakeStoreConnector
from vllm.platforms import current_platform


class _DoneAlready:
    """Stands in for `torch.cuda.Event`."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


if current_platform.is_cpu():
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.Event = _DoneAlready
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        torch.cpu._is_amx_tile_supported = lambda: False


class CpuMooncakeConnector(CountedMooncakeConnector):
    """`MooncakeConnector` on a CPU; the name shows in the engine's log that the plug-in was loaded."""


class CpuMooncakeStoreConnector(MooncakeStoreConnector):
    """`MooncakeStoreConnector` on a CPU."""


for _name in ("CpuMooncakeConnector", "CpuMooncakeStoreConnector"):  # MultiConnector looks its children up by name
    KVConnectorFactory.register_connector(_name, __name__, _name)
