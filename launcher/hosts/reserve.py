"""A plan whose ports and GPUs are free now, and kept from other launchers until the run is over."""

import random
import time
from dataclasses import dataclass

from ..errors import PortBusyError
from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.lockfile import LockFile
from ..plan.plan import Plan
from ..plan.planner import make_plan
from .host import Host, Reservation, gpus_named

_TRIES = 20
_LONGEST_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Reserved:
    """A plan, what it was made from, and what keeps others off."""

    plan: Plan
    facts: HostFacts
    reservation: Reservation


def reserve(config: LaunchConfig, host: Host, lock: LockFile | None = None) -> Reserved:
    """Another launcher may be choosing from the same ranges: whoever comes second chooses again.

    Raises ConfigError, or PortBusyError when too little is free, or what `lock` wants is not.
    """
    seats = lock.seats if lock else ()
    for tried in range(1, _TRIES + 1):
        facts = host.facts(config)
        plan = make_plan(config, facts, seats)
        reservation = host.reservation()
        try:
            reservation.take(plan.ports, gpus_named(plan.devices, facts.gpus))
        except PortBusyError:
            if tried == _TRIES or seats:
                raise
            time.sleep(random.uniform(0, _LONGEST_PAUSE_S))  # noqa: S311  so that two do not meet again and again
        else:
            return Reserved(plan, facts, reservation)
    raise AssertionError
