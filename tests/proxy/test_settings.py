"""Settings, from flags, a file and the environment."""

from pathlib import Path
from typing import Any

import pytest
import typer.testing

from proxy import cli
from proxy.cli import UsageError, _in_file, flag, flagged_settings, settings_from
from proxy.settings import ProxySettings

NODES: dict[str, Any] = {"prefill": ["http://p:1"], "decode": ["http://d:1"]}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ProxySettings]:
    """What `pd-proxy` would serve with, instead of serving."""
    found: list[ProxySettings] = []
    monkeypatch.setattr(cli, "run", found.append)
    monkeypatch.delenv("PD_PROXY_API_KEYS", raising=False)
    return found


def call(*args: str) -> Any:
    return typer.testing.CliRunner().invoke(cli.app, ["--prefill", "http://p:1", "--decode", "http://d:1", *args])


@pytest.mark.parametrize("name", [*flagged_settings()])
def test_every_setting_has_a_flag_that_says_what_it_is_for(name: str) -> None:
    assert flagged_settings()[name].description
    shown = typer.testing.CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
    assert flag(name) in shown


def test_a_flag_counts_more_than_the_file_and_the_file_more_than_the_default(
    served: list[ProxySettings], tmp_path: Path
) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("max-queue: 5\nmax_in_flight: 7\nresume: false\nlog-requests: true\n")
    assert call("--config", str(file), "--max-queue", "9").exit_code == 0
    (settings,) = served
    assert (settings.max_queue, settings.max_in_flight, settings.resume, settings.log_requests) == (9, 7, False, True)
    assert settings.queue_timeout_s == ProxySettings.model_fields["queue_timeout_s"].default


def test_nodes_may_stand_in_the_file(served: list[ProxySettings], tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("prefill: [http://p:1 8900]\ndecode: [http://d:1]\nconnector: NixlConnector\n")
    assert typer.testing.CliRunner().invoke(cli.app, ["--config", str(file)]).exit_code == 0
    assert [node.name for node in served[0].topology.nodes] == ["prefill-0", "decode-0"]
    assert served[0].topology.connector == "NixlConnector"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max-que: 5", "there is no setting 'max_que'"),
        ("node_api_key: x", "secrets come from the environment"),
        ("- 5", "no list of settings"),
        ("a: [", "is not YAML"),
        ("", "no list of settings"),
    ],
)
def test_a_file_that_cannot_be_used_is_said(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        _in_file(file)


def test_keys_are_stripped_and_an_empty_list_of_them_is_no_open_door() -> None:
    assert settings_from(NODES, {"PD_PROXY_API_KEYS": "first, second ,"}).api_keys == ("first", "second")
    for empty in ("", " ", ","):
        with pytest.raises(UsageError, match="has no key in it"):
            settings_from(NODES, {"PD_PROXY_API_KEYS": empty})


def test_two_prefill_nodes_on_one_host_need_two_bootstrap_ports() -> None:
    with pytest.raises(ValueError, match="more than one node has the bootstrap http://p:8998"):
        settings_from({"prefill": ["http://p:1", "http://p:2"], "decode": ["http://d:1"]}, {})
