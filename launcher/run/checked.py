"""A plan that was made, reserved and checked: what may be started."""

from ..check.checks import check
from ..check.findings import Checked, refuse_errors
from ..errors import LauncherError
from ..hosts.host import Host
from ..hosts.reserve import Reserved, reserve
from ..plan.config import LaunchConfig
from ..plan.lockfile import LockFile


def reserve_checked(config: LaunchConfig, host: Host, lock: LockFile | None = None) -> tuple[Reserved, list[Checked]]:
    """Raises the first error that was found; nothing is left reserved then."""
    reserved = reserve(config, host, lock)
    checked = check(config, reserved.plan, reserved.facts, lock)
    try:
        refuse_errors(checked)
    except LauncherError:
        reserved.reservation.close()
        raise
    return reserved, checked
