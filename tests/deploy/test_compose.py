"""docker-compose.yml against the Compose Specification's JSON schema (check-jsonschema has it).

The schema judges form alone; what the services mean is tested below it.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
ENV_EXAMPLE = ROOT / "deploy" / ".env.example"

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<operator>:[-?])?(?P<operand>[^}]*)\}")
_SETTING = re.compile(r"^#?(?P<name>[A-Z][A-Z_]+)=(?P<value>.*)$", re.MULTILINE)


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts"), "check-jsonschema")
    command: list[str | Path] = [program, "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def interpolate(text: str, settings: dict[str, str]) -> str:
    """Fills ${NAME}, ${NAME:-default} and ${NAME:?message} as compose does."""

    def value(match: re.Match[str]) -> str:
        given = settings.get(match["name"], "")
        if given or match["operator"] is None:
            return given
        if match["operator"] == ":?":
            raise KeyError(match["name"])
        return match["operand"]

    return _VARIABLE.sub(value, text)


def settings(*, commented: bool) -> dict[str, str]:
    """The settings of .env.example; with `commented`, also those that show a default."""
    text = ENV_EXAMPLE.read_text()
    return {m["name"]: m["value"] for m in _SETTING.finditer(text) if commented or m[0][0] != "#"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = interpolate(COMPOSE_FILE.read_text(), settings(commented=False))
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


@pytest.fixture(params=["server", "server-cpu"])
def service(request: pytest.FixtureRequest, compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"][request.param]
    return found


def test_it_matches_the_specification() -> None:
    checked = validate(COMPOSE_FILE)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("commented", [False, True])
def test_it_matches_the_specification_with_its_settings_filled_in(
    tmp_path: Path, commented: bool
) -> None:
    filled = tmp_path / "docker-compose.yml"
    filled.write_text(interpolate(COMPOSE_FILE.read_text(), settings(commented=commented)))
    checked = validate(filled)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    image: alter-server:gpu", "    imagee: alter-server:gpu"),
        ("restart: unless-stopped", "restart: [unless-stopped]"),
        ("capabilities: [gpu]", "capabilities: gpu"),
        ("volumes:\n  state:", "volume:\n  state:"),
    ],
)
def test_a_broken_file_is_reported(tmp_path: Path, right: str, wrong: str) -> None:
    text = COMPOSE_FILE.read_text()
    assert right in text
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace(right, wrong))
    assert validate(broken).returncode != 0


def test_up_starts_the_gpu_server_alone(compose: dict[str, Any]) -> None:
    started = [name for name, service in compose["services"].items() if "profiles" not in service]
    assert started == ["server"]
    [device] = compose["services"]["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]


def test_the_cpu_server_asks_for_no_gpu(compose: dict[str, Any]) -> None:
    server_cpu = compose["services"]["server-cpu"]
    assert server_cpu["profiles"] == ["cpu"]
    assert server_cpu["build"]["target"] == "cpu"
    assert "deploy" not in server_cpu


def test_the_port_is_published_on_loopback(service: dict[str, Any]) -> None:
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_the_admin_token_comes_from_a_secret_file(
    compose: dict[str, Any], service: dict[str, Any]
) -> None:
    [secret] = service["secrets"]
    assert service["environment"]["ALTER_ADMIN_TOKEN_FILE"] == f"/run/secrets/{secret}"
    assert set(compose["secrets"][secret]) == {"file"}
    assert "ALTER_ADMIN_TOKEN" not in service["environment"]


def test_bundles_are_read_only_and_volumes_are_declared(
    compose: dict[str, Any], service: dict[str, Any]
) -> None:
    mounts = dict(volume.split(":", 1) for volume in service["volumes"])
    assert mounts.pop("./bundles") == "/bundles:ro"
    assert mounts == {"state": "/state", "model-cache": "/state/huggingface"}
    assert set(mounts) == set(compose["volumes"])


def test_it_drops_privileges_and_comes_back_after_a_crash(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"


def test_the_command_serves_the_model_with_the_substrate(service: dict[str, Any]) -> None:
    model, *flags = service["command"].split()
    assert model == settings(commented=False)["ALTER_MODEL"]
    assert flags == ["--alter-substrate", "/bundles/substrate"]


@pytest.mark.parametrize("name", ["ALTER_MODEL", "ALTER_SUBSTRATE"])
def test_it_refuses_to_start_without_a_needed_setting(name: str) -> None:
    given = settings(commented=False)
    del given[name]
    with pytest.raises(KeyError, match=name):
        interpolate(COMPOSE_FILE.read_text(), given)


def test_every_setting_is_documented_with_the_default_it_has() -> None:
    text = COMPOSE_FILE.read_text()
    used = {m["name"]: m["operand"] for m in _VARIABLE.finditer(text)}
    passed_on = dict.fromkeys(re.findall(r"^  ([A-Z][A-Z_]+):(?: #.*)?$", text, re.MULTILINE), "")
    documented = settings(commented=True)
    assert set(documented) == set(used) | set(passed_on)
    optional = set(documented) - set(settings(commented=False))
    assert {name: documented[name] for name in optional} == {
        name: (used | passed_on)[name] for name in optional
    }
