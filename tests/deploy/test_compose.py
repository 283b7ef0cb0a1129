"""docker-compose.yml against the Compose Specification's JSON schema (check-jsonschema has it).

The schema judges form alone; what the services mean is tested below it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from server.settings import ENV_PREFIX, Environment, ServeSettings

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


SIDECARS = ["postgres", "prometheus", "grafana"]


def started_by(compose: dict[str, Any], *names: str) -> set[str]:
    """What `docker compose up NAMES` starts: those, and what they depend on."""
    needed = {
        other for name in names for other in compose["services"][name].get("depends_on", {})
    } - set(names)
    return started_by(compose, *names, *needed) if needed else set(names)


def test_up_starts_the_gpu_server_and_what_belongs_to_it(compose: dict[str, Any]) -> None:
    started = [name for name, service in compose["services"].items() if "profiles" not in service]
    assert started == ["server", *SIDECARS]
    [device] = compose["services"]["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]


def test_the_cpu_server_asks_for_no_gpu(compose: dict[str, Any]) -> None:
    server_cpu = compose["services"]["server-cpu"]
    assert server_cpu["profiles"] == ["cpu"]
    assert server_cpu["build"]["target"] == "cpu"
    assert "deploy" not in server_cpu


def test_one_command_starts_all_of_it_without_a_gpu_too(compose: dict[str, Any]) -> None:
    assert started_by(compose, "server-cpu", "grafana") == {"server-cpu", *SIDECARS}
    comments = COMPOSE_FILE.read_text().split("name:")[0]
    assert "docker compose --profile cpu up server-cpu grafana" in comments


def test_every_port_is_published_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: s["ports"] for name, s in compose["services"].items() if "ports" in s}
    assert published == {
        "server": ["127.0.0.1:8000:8000"],
        "server-cpu": ["127.0.0.1:8000:8000"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_every_service_is_confined(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert "privileged" not in service, name


def test_images_of_others_have_a_version_and_no_registry_and_run_without_root(
    compose: dict[str, Any],
) -> None:
    for name in SIDECARS:
        repository, _, tag = compose["services"][name]["image"].partition(":")
        assert re.search(r"\d+\.\d+", tag), name
        assert "." not in repository.split("/")[0], name
        user, _, group = compose["services"][name]["user"].partition(":")
        assert int(user) > 0, name
        assert group.isdigit(), name


def test_every_service_has_a_health_check_and_who_needs_it_waits_for_it(
    compose: dict[str, Any], service: dict[str, Any]
) -> None:
    services = compose["services"]
    assert all("healthcheck" in each for each in services.values())
    assert all("test" in services[name]["healthcheck"] for name in SIDECARS)
    healthy = {"condition": "service_healthy"}
    assert service["depends_on"] == {"postgres": healthy}
    assert services["grafana"]["depends_on"] == {"prometheus": healthy}
    # Over its socket the database also answers while its image still sets it up.
    assert "--host=127.0.0.1" in services["postgres"]["healthcheck"]["test"]


def test_the_registry_is_reached_by_servers_alone(compose: dict[str, Any]) -> None:
    assert compose["networks"]["registry"] == {"internal": True}
    inside = [n for n, s in compose["services"].items() if "registry" in s.get("networks", {})]
    assert inside == ["server", "server-cpu", "postgres"]
    assert compose["services"]["postgres"]["networks"] == ["registry"]
    assert "ports" not in compose["services"]["postgres"]


def test_servers_find_the_registry_with_the_password_of_a_secret(
    compose: dict[str, Any], service: dict[str, Any], tmp_path: Path
) -> None:
    secret = "/run/secrets/alter_registry_password"
    assert service["environment"]["ALTER_REGISTRY_PASSWORD_FILE"] == secret
    postgres = compose["services"]["postgres"]
    assert postgres["environment"]["POSTGRES_PASSWORD_FILE"] == secret
    assert "alter_registry_password" in service["secrets"]
    assert postgres["secrets"] == ["alter_registry_password"]
    password = tmp_path / "password"
    password.write_text("0123")
    settings = ServeSettings.build(
        substrate=Path("/s"),
        registry=service["environment"]["ALTER_REGISTRY"],
        registry_password_file=password,
    )
    url = make_url(str(settings.registry))
    assert (url.username, url.database) == (
        postgres["environment"]["POSTGRES_USER"],
        postgres["environment"]["POSTGRES_DB"],
    )
    assert (url.host, url.password) == ("postgres", "0123")


def test_every_environment_variable_of_ours_is_one_that_the_server_reads(
    service: dict[str, Any],
) -> None:
    known = {ENV_PREFIX + name.upper() for name in Environment.model_fields}
    assert {name for name in service["environment"] if name.startswith(ENV_PREFIX)} <= known


def test_files_that_are_mounted_exist(compose: dict[str, Any]) -> None:
    mounted = {
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
    }
    folders = {path for path in mounted if path.startswith("./deploy/")}
    assert len(folders) == 3
    assert all((ROOT / path).is_dir() for path in folders)


def test_secrets_are_made_once_and_kept_from_others(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    script = tmp_path / "deploy" / "secrets.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "deploy" / "secrets.sh", script)
    made = [tmp_path / entry["file"] for entry in compose["secrets"].values()]
    contents = []
    for _ in range(2):
        subprocess.run([script], check=True, capture_output=True)
        contents.append([path.read_text() for path in made])
    assert contents[0] == contents[1]
    assert len(set(contents[0])) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in contents[0])
    assert {path.stat().st_mode & 0o777 for path in made} == {0o644}
    assert made[0].parent.stat().st_mode & 0o777 == 0o700
    made[1].unlink()
    subprocess.run([script], check=True, capture_output=True)
    again = [path.read_text() for path in made]
    assert [old == new for old, new in zip(contents[0], again, strict=True)] == [True, False, True]


def test_the_admin_token_comes_from_a_secret_file(
    compose: dict[str, Any], service: dict[str, Any]
) -> None:
    secret = "alter_admin_token"
    assert secret in service["secrets"]
    assert service["environment"]["ALTER_ADMIN_TOKEN_FILE"] == f"/run/secrets/{secret}"
    assert set(compose["secrets"][secret]) == {"file"}
    assert "ALTER_ADMIN_TOKEN" not in service["environment"]


def test_bundles_are_read_only_and_volumes_are_declared(
    compose: dict[str, Any], service: dict[str, Any]
) -> None:
    mounts = dict(volume.split(":", 1) for volume in service["volumes"])
    assert mounts.pop("./bundles") == "/bundles:ro"
    assert mounts == {"state": "/state", "model-cache": "/state/huggingface"}
    named = {
        volume.split(":")[0]
        for each in compose["services"].values()
        for volume in each["volumes"]
        if not volume.startswith(".")
    }
    assert named == set(compose["volumes"])


def test_what_the_server_compiles_can_be_loaded_from_its_scratch_folder(
    service: dict[str, Any],
) -> None:
    [scratch] = service["tmpfs"]
    path, _, options = scratch.partition(":")
    assert path == "/tmp"
    assert "exec" in options.split(","), "Docker mounts tmpfs noexec"


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
