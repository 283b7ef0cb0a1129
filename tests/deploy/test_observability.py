"""Prometheus and Grafana: every expression parses and names only metrics that are exported."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from server.metrics import AlterMetrics

from .promql import metrics_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
PROMETHEUS = DEPLOY / "prometheus" / "prometheus.yml"
PROVISIONING = DEPLOY / "grafana" / "provisioning"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))

_VLLM_METRIC = re.compile(r"""["'](vllm:\w+)["']""")
_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def our_metrics() -> set[str]:
    """Every sample that the server exports, a series of each label set made."""
    registry = CollectorRegistry()
    metrics = AlterMetrics(registry)
    metrics.set_info(version="1", substrate="sha256:0")
    return {sample.name for metric in registry.collect() for sample in metric.samples}


def vllm_metrics() -> set[str]:
    """Every sample that vLLM may export, by the names in its source."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("v1") / "metrics" / "loggers.py"
    names = _VLLM_METRIC.findall(source.read_text())
    assert names
    return {name + suffix for name in names for suffix in _SUFFIXES}


EXPORTED = our_metrics() | vllm_metrics() | {"up"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(ALERTS)["groups"] for rule in group["rules"]]


def dashboard(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def found_below(node: Any, key: str) -> Iterator[Any]:
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from found_below(item, key)


def expressions() -> list[str]:
    of_alerts = [rule["expr"] for rule in rules()]
    of_boards = [expr for path in DASHBOARDS for expr in found_below(dashboard(path), "expr")]
    return of_alerts + of_boards


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_only_what_is_exported(expression: str) -> None:
    named = metrics_of(expression)
    assert named
    assert named - EXPORTED == set()


@pytest.mark.parametrize(
    "expression", ["rate(alter_epoch)[", "sum by alter_epoch", '{job="alter"}', "rate(alter_epoch)"]
)
def test_what_is_no_expression_is_found(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        metrics_of(expression)


def test_names_are_found_wherever_they_stand() -> None:
    expression = (
        "-(sum by (a) (rate(m1[$__rate_interval])) / on (a) m2 > 3) or vector(0) "
        'and label_replace(max_over_time(m3{x="m9"}[1h:1m]), "a", "b", "c", "d") unless topk(2, m4)'
    )
    assert metrics_of(expression) == {"m1", "m2", "m3", "m4"}


def test_a_metric_that_nobody_exports_would_be_found() -> None:
    assert "alter_epoch" in EXPORTED
    assert "alter_switch_seconds_bucket" in EXPORTED
    assert not {"alter_epochs", "vllm:nothing", "alter_switch_failures"} & EXPORTED


def test_every_metric_of_ours_is_shown_or_watched() -> None:
    used = set().union(*(metrics_of(expression) for expression in expressions()))
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in our_metrics()}
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert {name.removesuffix("_total") for name in families} - {
        name.removesuffix("_total") for name in seen
    } == {"alter_canary_seconds"}


def test_alerts_say_what_and_how_urgent_and_the_guide_says_what_to_do() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text()
    names = Counter(rule["alert"] for rule in rules())
    assert set(names.values()) == {1}
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f"| {rule['alert']} |" in guide


def test_a_domain_that_nobody_asks_about_is_no_alert() -> None:
    watched = set().union(*(metrics_of(rule["expr"]) for rule in rules()))
    assert not any(name.startswith("alter_routed_tokens") for name in watched)


def test_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, which is part of Prometheus, is not installed")
    for command in (
        ["test", "rules", str(Path(__file__).with_name("alerts.test.yml"))],
        ["check", "config", str(PROMETHEUS)],
    ):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_that_is_tested_exists() -> None:
    tested = set(found_below(load(Path(__file__).with_name("alerts.test.yml")), "alertname"))
    assert tested <= {rule["alert"] for rule in rules()}


def test_prometheus_loads_the_rules_and_scrapes_the_name_that_compose_gives_the_server() -> None:
    config = load(PROMETHEUS)
    assert [PROMETHEUS.parent / name for name in config["rule_files"]] == [ALERTS]
    [targets] = [s for s in config["scrape_configs"] if s["job_name"] == "alter"]
    [target] = targets["static_configs"][0]["targets"]
    name, port = target.split(":")
    services = load(ROOT / "docker-compose.yml")["services"]
    for service in (services["server"], services["server-cpu"]):
        assert service["networks"]["default"]["aliases"] == [name]
        assert service["ports"][0].endswith(f":{port}")


def test_there_is_a_dashboard_and_grafana_is_told_where() -> None:
    assert DASHBOARDS
    [provider] = load(PROVISIONING / "dashboards" / "alter.yml")["providers"]
    grafana = load(ROOT / "docker-compose.yml")["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / "grafana" / "dashboards" / home.name).is_file()
    assert str(home.parent) == provider["options"]["path"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_reads_one_data_source_and_the_provisioned_one_is_its_default(
    path: Path,
) -> None:
    board = dashboard(path)
    [source] = load(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    [variable] = [v for v in board["templating"]["list"] if v["type"] == "datasource"]
    assert variable["current"]["value"] == source["uid"]
    assert variable["query"] == source["type"]
    used = {(ref["type"], ref["uid"]) for ref in found_below(board, "datasource")}
    assert used == {(source["type"], "${" + variable["name"] + "}")}
    for panel in panels(board):
        assert panel["datasource"]
        assert all(target["datasource"] for target in panel["targets"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_ids_titles_and_places_of_their_own(path: Path) -> None:
    board = dashboard(path)
    ids = Counter(panel["id"] for panel in board["panels"])
    assert set(ids.values()) == {1}
    assert all(panel["title"] and panel["description"] for panel in panels(board))
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert set(cells.values()) == {1}
    assert max(x for x, _ in cells) == 23
    for panel in panels(board):
        refs = Counter(target["refId"] for target in panel["targets"])
        assert set(refs.values()) == {1}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_variables_that_are_used_are_there(path: Path) -> None:
    board = dashboard(path)
    named = {v["name"] for v in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board)))
    assert {name for name in used if not name.startswith("__")} == named
