"""One end of a transfer between two real transfer engines, without any serving engine around them.

Run by `pd-launch test` in the engine's environment, with a node's own variables, so on its planned ports:

    receive HOST PROTOCOL BYTES                    says where it is; after a line on stdin, the hash of what it got
    send HOST PROTOCOL BYTES SESSION ADDRESS       writes random bytes there, says their hash and how long it took
"""

import ctypes
import hashlib
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

for _runtime in Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib/libcudart.so.*"):
    ctypes.CDLL(
        str(_runtime), ctypes.RTLD_GLOBAL
    )  # Mooncake's CUDA build finds it only when it is loaded, as torch does

from mooncake.engine import TransferEngine  # noqa: E402

ROUNDS = 4


def main() -> None:
    what, host, protocol, size, *peer = sys.argv[1:]
    engine = TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", protocol, "") != 0:
        sys.exit(f"the transfer engine did not start on {host} with {protocol}")
    memory = (ctypes.c_ubyte * int(size))()
    address = ctypes.addressof(memory)
    if what == "send":
        memory[:] = os.urandom(int(size))
    if engine.register_memory(address, int(size)) != 0:
        sys.exit("the transfer engine did not take the memory")
    if what == "receive":
        tell(session=f"{host}:{engine.get_rpc_port()}", address=address, port=engine.get_rpc_port())
        sys.stdin.readline()
        tell(sha256=hashlib.sha256(memory).hexdigest())
        return
    session, remote = peer
    began = time.perf_counter()
    for _ in range(ROUNDS):
        if engine.transfer_sync_write(session, address, int(remote), int(size)) != 0:
            sys.exit(f"no byte could be written to {session}")
    seconds = (time.perf_counter() - began) / ROUNDS
    tell(sha256=hashlib.sha256(memory).hexdigest(), seconds=seconds, port=engine.get_rpc_port())


def tell(**facts: object) -> None:
    print("PROBE", json.dumps(facts), flush=True)  # the engine writes its own lines here too


if __name__ == "__main__":
    main()
