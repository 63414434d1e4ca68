"""The machine that the launcher runs on, as a host of children."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ... import private
from ...errors import LauncherError
from ...plan.config import LaunchConfig
from ...plan.facts import HostFacts
from ...plan.plan import Plan, Process
from ...plan.seats import Port
from . import members, ports
from .facts import gather
from .locks import Locks
from .ports import Hold
from .process import Child


class LocalHost:
    """Implements `hosts.host.Host`."""

    def facts(self, config: LaunchConfig, further: Sequence[Port] = (), *, engine: bool = True) -> HostFacts:
        return gather(config, further, engine=engine)

    def reservation(self) -> Locks:
        return Locks()

    def hold(self, of: Iterable[Port]) -> Hold:
        return Hold(of)

    def holder_of(self, of: Iterable[Port]) -> str:
        return ports.holder_of(of)

    def prepare(self, plan: Plan) -> None:
        """Raises LauncherError. The temporary folder is this user's only, and empty: a killed run may have left one."""
        folder = plan.temporary
        try:
            if folder.exists() and folder.stat().st_uid == os.getuid() and not folder.is_symlink():
                shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
        except OSError as exc:
            raise LauncherError(f"cannot make the folder {folder}: {exc.strerror}", "Is it somebody else's?") from exc
        for name, text in plan.files.items():
            try:
                private.write(plan.run_dir / name, text)
            except OSError as exc:
                raise LauncherError(f"cannot write {name} in {plan.run_dir}: {exc.strerror}") from exc

    def remove_temporary(self, plan: Plan) -> None:
        shutil.rmtree(plan.temporary, ignore_errors=True)

    async def start(self, spec: Process, run_id: str, folder: Path) -> Child:
        return await Child.start(spec, run_id, folder)

    def shared_memory(self, sessions: Iterable[int]) -> set[Path]:
        return members.shared_memory(members.of_sessions(set(sessions)))

    def remove_shared_memory(self, files: Iterable[Path]) -> None:
        members.remove_unmapped(files)

    def kill_rest(self, run_id: str, sessions: Iterable[int]) -> list[str]:
        return members.kill(members.members(run_id, set(sessions)))
