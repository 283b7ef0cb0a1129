"""The manifests against Kubernetes' own schemas (kubernetes-validate has them), and what they mean."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from alter_cli.main import whole_app
from server.api.health import LIVE, READY
from server.reconciler import STOP_TIMEOUT_S
from server.registry.database import DEFAULT_TIMEOUT_S
from server.registry.registry import DEFAULT_LEASE_S
from server.settings import ENV_PREFIX, Environment

from .dockerfile import read_stages

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
MONITORING = KUBERNETES / "overlays" / "monitoring"
VERSIONS = ("1.30", "1.37")
OPERATOR_API = "monitoring.coreos.com/v1"
OURS = {"app.kubernetes.io/name": "alter"}


def read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The manifests that a kustomization names, by kind and name."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in kustomization["resources"]:
        if (folder / name).is_dir():
            found |= read(folder / name)
            continue
        for document in yaml.safe_load_all((folder / name).read_text()):
            key = document["kind"], document["metadata"]["name"]
            assert key not in found
            found[key] = document
    return found


ALL = read(MONITORING)
TRAINING = read(KUBERNETES / "training")
CORE = TRAINING | {
    key: document for key, document in ALL.items() if document["apiVersion"] != OPERATOR_API
}
SET = ALL["StatefulSet", "alter"]["spec"]
POD = SET["template"]["spec"]
[SERVER] = POD["containers"]
CONFIG = ALL["ConfigMap", "alter-config"]["data"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key", CORE, ids="-".join)
def test_a_manifest_matches_the_api(key: tuple[str, str], version: str) -> None:
    kubernetes_validate.validate(CORE[key], version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("replicas",), "two"),
        (("template", "spec", "terminationGracePeriod"), 60),
        (("template", "spec", "containers", 0, "readinessProbe", "httpGet", "port"), None),
        (("template", "spec", "containers", 0, "ports", 0), {"name": "http"}),
    ],
)
def test_a_broken_manifest_is_reported(path: tuple[Any, ...], value: object) -> None:
    broken = copy.deepcopy(ALL["StatefulSet", "alter"])
    node = broken["spec"]
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    "folder", [BASE, MONITORING, KUBERNETES / "training"], ids=lambda folder: folder.name
)
def test_every_file_belongs_to_the_kustomization(folder: Path) -> None:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    named = {name for name in kustomization["resources"] if not (folder / name).is_dir()}
    assert named == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert kustomization["namespace"] == "alter"


def test_selectors_find_the_servers() -> None:
    labels = SET["template"]["metadata"]["labels"]
    assert labels == SET["selector"]["matchLabels"] == OURS
    for name in ("alter", "alter-admin", "alter-pods"):
        assert ALL["Service", name]["spec"]["selector"] == labels
    assert SET["serviceName"] == "alter-pods"
    assert ALL["Service", "alter-pods"]["spec"]["clusterIP"] == "None"
    assert ALL["PodDisruptionBudget", "alter"]["spec"]["selector"]["matchLabels"] == labels
    for name in ("alter", "alter-metrics"):
        assert ALL["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"] == labels
    [spread] = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels


def test_ports_that_are_named_are_open_and_nothing_else_is() -> None:
    ports = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
    [exposed] = read_stages(ROOT / "Dockerfile")["gpu"].arguments("EXPOSE")
    assert ports == {"http": int(exposed), "admin": int(CONFIG["ALTER_ADMIN_PORT"])}
    for name in ("alter", "alter-admin", "alter-pods"):
        for port in ALL["Service", name]["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    allowed = {
        port["port"]
        for name in ("alter", "alter-metrics")
        for rule in ALL["NetworkPolicy", name]["spec"]["ingress"]
        for port in rule["ports"]
    }
    assert allowed == set(ports.values())
    assert all("from" in rule for rule in ALL["NetworkPolicy", "alter"]["spec"]["ingress"])


def test_clients_get_ready_servers_and_operators_any() -> None:
    assert not ALL["Service", "alter"]["spec"].get("publishNotReadyAddresses", False)
    assert ALL["Service", "alter-admin"]["spec"]["publishNotReadyAddresses"] is True


def test_probes_ask_what_they_are_for() -> None:
    asked = {
        probe: SERVER[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert asked == {"startupProbe": LIVE, "livenessProbe": LIVE, "readinessProbe": READY}
    startup = SERVER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 15 * 60


def test_a_server_has_time_to_leave_the_fleet_before_it_is_killed() -> None:
    command = SERVER["lifecycle"]["preStop"]["exec"]["command"]
    arguments = SERVER["args"]
    pre_stop_s, drain_s = int(command[1]), int(arguments[arguments.index("--shutdown-timeout") + 1])
    needed_s = pre_stop_s + drain_s + STOP_TIMEOUT_S + DEFAULT_TIMEOUT_S
    assert needed_s <= POD["terminationGracePeriodSeconds"] - 10
    assert float(CONFIG["ALTER_LEASE_S"]) == DEFAULT_LEASE_S
    readiness = SERVER["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < DEFAULT_LEASE_S


def test_the_configuration_is_one_that_the_server_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {ENV_PREFIX + name.upper() for name in Environment.model_fields}
    assert set(CONFIG) - {"ALTER_MODEL"} <= known
    assert SERVER["args"][0] == "$(ALTER_MODEL)"
    for name, value in CONFIG.items():
        assert isinstance(value, str)
        monkeypatch.setenv(name, value)
    environment = Environment()
    assert environment.admin_port == 8001
    assert environment.log_format == "json"


def test_kubernetes_own_variables_do_not_become_settings() -> None:
    """A Service `alter-admin` would set ALTER_ADMIN_PORT, one `alter` ALTER_PORT."""
    made = {name.upper().replace("-", "_") + "_PORT" for kind, name in ALL if kind == "Service"}
    assert made & {ENV_PREFIX + name.upper() for name in Environment.model_fields}
    assert POD["enableServiceLinks"] is False


def test_paths_of_the_configuration_are_mounted() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in SERVER["volumeMounts"]}
    for name, value in CONFIG.items():
        if value.startswith("/"):
            assert any(value == path or value.startswith(path + "/") for path in mounts), name
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    templates = {template["metadata"]["name"] for template in SET["volumeClaimTemplates"]}
    assert set(mounts.values()) == set(volumes) | templates
    assert "/state" in mounts, "the audit log is there"
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes.values()
        if "persistentVolumeClaim" in volume
    }
    assert claims == {name for kind, name in ALL if kind == "PersistentVolumeClaim"}
    files = {f"/secrets/{item['path']}" for item in volumes["secrets"]["secret"]["items"]}
    assert files == {CONFIG["ALTER_ADMIN_TOKEN_FILE"], CONFIG["ALTER_REGISTRY_PASSWORD_FILE"]}


def test_each_server_has_an_audit_log_that_outlives_its_pod() -> None:
    [template] = SET["volumeClaimTemplates"]
    assert template["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert set(SET["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
    stage = read_stages(ROOT / "Dockerfile")["gpu"]
    assert "ALTER_AUDIT_LOG=/state/audit.sqlite" in stage.last("ENV")
    assert "ALTER_AUDIT_LOG" not in CONFIG


def test_the_server_is_confined() -> None:
    user = int(read_stages(ROOT / "Dockerfile")["gpu"].last("USER").split(":")[0])
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] == POD["securityContext"]["fsGroup"] == user
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert SERVER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False
    assert SERVER["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_training_job_runs_what_alter_takes_with_what_the_servers_have() -> None:
    job = TRAINING["Job", "alter-training"]["spec"]["template"]["spec"]
    [container] = job["containers"]
    values = CONFIG | {each["name"]: each["value"] for each in container["env"]}
    line = [*container["command"], *container["args"]]
    line = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in line]
    assert line[:2] == ["alter", "train"]
    command = typer.main.get_command(whole_app()).commands["train"]
    asked = command.make_context("train", line[2:]).params
    assert asked["resume"]
    assert str(asked["substrate"]) == CONFIG["ALTER_SUBSTRATE"]
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    for path in (asked["model"], asked["substrate"], asked["out"], *asked["retain"]):
        assert "/" + path.parts[1] in mounts
    assert mounts["/bundles"]["readOnly"]
    assert container["securityContext"] == SERVER["securityContext"]
    assert job["securityContext"] == POD["securityContext"]
    claims = {
        v["persistentVolumeClaim"]["claimName"] for v in job["volumes"] if "emptyDir" not in v
    }
    known = {name for kind, name in (ALL | TRAINING) if kind == "PersistentVolumeClaim"}
    assert claims <= known


def test_no_secret_is_in_a_manifest() -> None:
    assert not any(kind == "Secret" for kind, _ in ALL)
    assert "@" not in CONFIG["ALTER_REGISTRY"].split("@", 1)[1]
    assert ":" not in CONFIG["ALTER_REGISTRY"].removeprefix("postgresql://").split("@")[0]


def test_secrets_that_are_named_are_in_the_guide() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text()
    for text in ("alter-secrets", "alter-admin-tls", "admin-token", "registry-password"):
        assert text in guide


def test_the_operators_rules_are_those_of_prometheus() -> None:
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert ALL["PrometheusRule", "alter"]["spec"] == alerts


def test_every_server_is_scraped_ready_or_not() -> None:
    monitor = ALL["ServiceMonitor", "alter"]["spec"]
    pods = ALL["Service", "alter-pods"]
    assert monitor["selector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()
    others = [d for k, d in ALL.items() if k[0] == "Service" and k[1] != "alter-pods"]
    assert all(
        not monitor["selector"]["matchLabels"].items() <= other["metadata"]["labels"].items()
        for other in others
    ), "each server once"
    [endpoint] = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in pods["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    assert pods["spec"]["publishNotReadyAddresses"] is True
