"""Addresses: can peers dial them, and who else can."""

import ipaddress
from collections.abc import Iterator

from ..plan.config import LaunchConfig
from ..plan.facts import HostFacts
from ..plan.plan import Plan
from .findings import Finding, error, warning


def check(config: LaunchConfig, plan: Plan, facts: HostFacts) -> tuple[str, Iterator[Finding]] | None:
    host = facts.addresses.get(config.host) or config.host
    looked_at = f"nodes on {host}, their bootstrap and transfer ports on all addresses; proxy on {plan.proxy_url}"
    return looked_at, _found(config, facts)


def _found(config: LaunchConfig, facts: HostFacts) -> Iterator[Finding]:
    yield from _of_nodes(config, facts)
    yield from _of_our_name(config, facts)
    yield from _of_clients(config, facts)


def _of_nodes(config: LaunchConfig, facts: HostFacts) -> Iterator[Finding]:
    one_of_ours = "Name one of this host's addresses"
    for flag, name in (("--host", config.host), ("--proxy-host", config.proxy_host)):
        if facts.addresses.get(name) == "":
            yield error(f"{flag} {name}: no IPv4 address is known for that name", "", one_of_ours)
    if ":" in config.host:
        yield error(
            f"--host {config.host} is an IPv6 address",
            "vLLM's bootstrap server listens on IPv4 only, and a prefill node would never become ready",
            "Name one of this host's IPv4 addresses",
        )
    if is_wildcard(config.host):
        yield error(
            f"--host {config.host} is no address that a peer could connect to",
            "Nodes bind it and tell it each other",
            one_of_ours,
        )
    if not is_loopback(_address(config.host, facts)):
        yield warning(
            f"anyone who reaches {config.host} may ask its nodes, and their bootstrap servers, which ask for no key",
            "Transfer engines and bootstrap servers listen on all addresses of the host",
            "Keep the ports of the nodes inside the cluster, by a firewall",
        )


def _of_our_name(config: LaunchConfig, facts: HostFacts) -> Iterator[Finding]:
    if facts.resolves_to is None:
        yield warning(
            f"this host's name, {facts.name}, resolves to no address",
            "gloo looks it up for the sockets between a node's processes",
            f"Add a line to /etc/hosts: 127.0.0.1 {facts.name}",
        )
    elif facts.resolves_to.startswith("127.") and not is_loopback(_address(config.host, facts)):
        yield warning(
            f"this host's name, {facts.name}, resolves to {facts.resolves_to}",
            "What looks it up tells others an address at which they reach themselves",
            f"In /etc/hosts, give the name its own address: {config.host} {facts.name}",
        )


def _of_clients(config: LaunchConfig, facts: HostFacts) -> Iterator[Finding]:
    variables = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    proxies = [name for name in variables if facts.environment.get(name)]
    if proxies and config.proxy_host not in facts.no_proxy and "*" not in facts.no_proxy:
        yield warning(
            f"{proxies[0]} is set, and NO_PROXY does not name {config.proxy_host}",
            "curl and the OpenAI client would ask that proxy for ours (pd-launch and its nodes do not)",
            f"export NO_PROXY=$NO_PROXY,{config.proxy_host}",
        )
    if not is_loopback(_address(config.proxy_host, facts)) and not facts.environment.get("PD_PROXY_API_KEYS"):
        yield warning(
            f"anyone who reaches {config.proxy_host}:{config.proxy_port} may use it",
            "It listens beyond loopback and has no keys",
            "Set PD_PROXY_API_KEYS",
        )


def _address(host: str, facts: HostFacts) -> str:
    return facts.addresses.get(host) or host


def is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::", "*")  # noqa: S104  looked for, not bound


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
