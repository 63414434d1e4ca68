"""The dashboard and the alerts, on a real Prometheus that watches a proxy and simulated nodes: every query is right."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engines.vllm import metrics as of_vllm
from tests.processes import MODEL, ROOT, Proxy, Sim, free_port, http, proxy_in_front_of, running, sim_node, wait_until
from tests.reference import metrics as documented

MONITORING = ROOT / "examples" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "pd-launch.json").read_text())
ALERTS = {
    rule["alert"]: rule["expr"]
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
PANELS = {
    f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "30s")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
NOT_ALWAYS = {
    "Retries, streams resumed B", "Prompt tokens found in prefix caches A", "Prompt tokens found in prefix caches B",
}  # fmt: skip
"""Panels that show nothing while no stream has lost its node, and no prompt came twice."""
_NAMES = re.compile(r"\b(?:pd_|vllm:)\w+")


def program(name: str) -> str:
    """Debian's; a test is skipped where there is none, but not in CI, which installs it."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"there is no {name}; .ci/run installs it")
        pytest.skip(f"there is no {name} here (Debian: apt-get install prometheus)")
    return found


@dataclass
class Watched:
    """A Prometheus, and what it watches."""

    url: str
    proxy: Proxy
    prefill: Sim
    decode: Sim

    def query(self, expression: str) -> list[Any]:
        """Its result. A query that is none is told by the answer's status."""
        answer = http.get(f"{self.url}/api/v1/query", params={"query": expression}).raise_for_status().json()
        found: list[Any] = answer["data"]["result"]
        return found

    def alerts(self) -> set[str]:
        """Those that are pending or firing."""
        told = http.get(f"{self.url}/api/v1/alerts").json()["data"]["alerts"]
        return {one["labels"]["alertname"] for one in told}


@contextmanager
def prometheus(folder: Path, proxy: str, admin: str) -> Iterator[str]:
    """With the example's own configuration, but for the addresses, and a look a second."""
    configured = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    configured["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configured["rule_files"] = [str(MONITORING / "alerts.yml")]
    own, nodes = configured["scrape_configs"]
    own["static_configs"][0]["targets"] = [proxy.removeprefix("http://")]
    nodes["http_sd_configs"][0] |= {"url": f"{admin}/targets", "refresh_interval": "1s"}
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configured))
    port = free_port()
    command = [program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: http.get(f"{url}/-/ready").is_success, "Prometheus")
        yield url


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """... after traffic in which most of what can be counted happened."""
    admin = free_port()
    with (
        sim_node("prefill") as prefill,
        sim_node("decode") as decode,
        proxy_in_front_of(prefill, decode, flags=["--admin-port", str(admin)]) as proxy,
        prometheus(tmp_path_factory.mktemp("prometheus"), proxy.url, f"http://127.0.0.1:{admin}") as url,
    ):
        made = Watched(url, proxy, prefill, decode)
        wait_until(lambda: len(made.query('up{job="vllm"} == 1')) == 2, "the nodes to be found")
        traffic(made)
        wait_until(lambda: made.query('pd_retries_total{reason="503"}'), "the retries to be seen")
        traffic(made)  # a rate needs two looks at a series
        wait_until(lambda: made.query("rate(pd_retries_total[30s]) > 0"), "a rate")
        wait_until(lambda: made.query("pd_kv_moving"), "the proof that KV moves")
        yield made


def traffic(watched: Watched) -> None:
    for number in range(12):
        if number == 5:
            watched.prefill.control(fault="status", status=503, times=1)
        ask(watched.proxy, stream=number % 2 == 0)
    assert ask(watched.proxy, model="nope").status_code == 404


def ask(proxy: Proxy, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "the quick brown fox " * 20, "max_tokens": 16} | fields
    return http.post(f"{proxy.url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize(("kind", "file"), [("rules", "alerts.yml"), ("config", "prometheus.yml")])
def test_rules_and_configuration_are_right_by_prometheus_own_check(kind: str, file: str, tmp_path: Path) -> None:
    command = [program("promtool"), "check", kind, str(MONITORING / file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_of_the_dashboard_has_data(watched: Watched, panel: str) -> None:
    result = watched.query(PANELS[panel])
    assert result or panel in NOT_ALWAYS


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_quiet_while_all_is_well(watched: Watched, alert: str) -> None:
    assert watched.query(ALERTS[alert]) == []


def test_only_series_that_there_are_are_asked_for() -> None:
    known = set(re.findall(r"`(pd_\w+)`", documented()))
    known |= {name for name in vars(of_vllm).values() if isinstance(name, str) and name.startswith("vllm:")}
    for expression in (*PANELS.values(), *ALERTS.values()):
        for name in _NAMES.findall(expression):
            assert {name, name.removesuffix("_bucket")} & known, expression


def test_a_node_that_dies_is_an_alert(tmp_path: Path, prefill: Sim) -> None:
    admin = free_port()
    with (
        sim_node("decode") as dying,
        proxy_in_front_of(prefill, dying, flags=["--admin-port", str(admin)]) as proxy,
        prometheus(tmp_path, proxy.url, f"http://127.0.0.1:{admin}") as url,
    ):
        watched = Watched(url, proxy, prefill, dying)
        wait_until(lambda: watched.query("pd_node_usable == 1"), "the first look")
        dying.process.kill()
        wait_until(lambda: watched.alerts() >= {"PdNodeNotUsable", "PdNoDecodeNode"}, "the alerts")


def test_grafana_is_given_what_is_there() -> None:
    """No Grafana is here: that it draws the dashboard was not tried."""
    source = yaml.safe_load((MONITORING / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels lie on each other"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    mounts = [mount.split(":")[0] for service in services.values() for mount in service["volumes"]]
    assert all((MONITORING / mount).exists() for mount in mounts)
