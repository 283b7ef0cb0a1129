"""The image, as far as it can be judged without a Docker engine: hadolint and the instructions."""

from __future__ import annotations

import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

from .dockerfile import Stage, read_stages

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
STAGES = read_stages(DOCKERFILE)
TARGETS = ("gpu", "cpu")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts"), "hadolint")
    command: list[str | Path] = [program, "--no-color", dockerfile]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing() -> None:
    found = hadolint(DOCKERFILE)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ("FORM debian:12", "unexpected"),
        ("FROM debian:latest", "DL3007"),
        ("FROM debian:12\nRUN cd /opt", "DL3003"),
        ("FROM debian:12\nUSER root", "DL3002"),
        ("FROM debian:12\nRUN echo $unquoted", "SC2086"),
    ],
)
def test_hadolint_reports_a_broken_dockerfile(tmp_path: Path, lines: str, rule: str) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(lines + "\n")
    found = hadolint(broken)
    assert found.returncode != 0
    assert rule in found.stdout


def test_the_gpu_image_is_the_default() -> None:
    assert list(STAGES)[-1] == "gpu"


def test_the_targets_differ_in_base_and_device_alone() -> None:
    def rest(stage: Stage) -> list[tuple[str, str]]:
        return [i for i in stage.instructions if i != ("ENV", f"ALTER_DEVICE={stage.name}")]

    gpu, cpu = STAGES["gpu"], STAGES["cpu"]
    assert rest(gpu) == rest(cpu)
    assert len(rest(gpu)) == len(gpu.instructions) - 1


def test_images_have_a_short_name_and_a_version(target: Stage) -> None:
    base = STAGES[target.image].image
    repository, _, tag = base.partition(":")
    assert tag[0].isdigit()
    assert "." not in repository.split("/")[0], "a dot makes the first part a registry host"


def test_the_install_step_is_the_script_that_make_runs(target: Stage) -> None:
    installs = [run for run in target.arguments("RUN") if run.endswith(" scripts/setup.sh")]
    assert len(installs) == 1
    assert not any("pip " in run for run in target.arguments("RUN") if run not in installs)
    recipe = (ROOT / "Makefile").read_text().split("\nsetup:")[1].split("\n\n")[0]
    assert "scripts/setup.sh" in recipe
    assert "pip " not in recipe


def let_through() -> set[str]:
    """What .dockerignore leaves in the build context."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return {line[1:] for line in lines if line.startswith("!")}


def packages() -> set[str]:
    """What setuptools installs: the folders that pyproject.toml includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    return {found.parent.name for p in patterns for found in ROOT.glob(f"{p}/__init__.py")}


def test_everything_copied_exists_and_passes_dockerignore(target: Stage) -> None:
    allowed = let_through()
    sources = {source for copy in target.arguments("COPY") for source in copy.split()[:-1]}
    assert sources == {path.split("/")[0] for path in allowed}
    assert all((ROOT / path).exists() for path in allowed)


def test_every_package_is_in_the_image(target: Stage) -> None:
    assert packages()
    assert {f"{name} {name}" for name in packages()} <= set(target.arguments("COPY"))
    assert packages() <= let_through()


def test_it_runs_as_a_numbered_user_without_root(target: Stage) -> None:
    user = target.last("USER").split(":")[0]
    assert user.isdigit(), "a number lets an orchestrator verify that it is not root"
    assert int(user) > 0
    privileged = [i for i in target.instructions if i[0] == "RUN"]
    last_run = target.instructions.index(privileged[-1])
    assert target.instructions.index(("USER", target.last("USER"))) > last_run


def test_what_it_writes_outside_of_scratch_folders_is_in_a_volume(target: Stage) -> None:
    """Caches follow HOME; the root file system is read-only where it is deployed."""
    settings = dict(pair.split("=", 1) for pair in target.last("ENV").split())
    for name in ("HOME", "HF_HOME", "ALTER_AUDIT_LOG"):
        assert f"{settings[name]}/".startswith("/state/"), name


def test_it_serves_and_checks_health_on_port_8000(target: Stage) -> None:
    assert target.last_list("ENTRYPOINT") == ["alter", "serve"]
    assert target.last("EXPOSE") == "8000"
    assert "http://127.0.0.1:8000/health" in target.last_list("HEALTHCHECK")[-1]
    assert target.last_list("VOLUME") == ["/bundles", "/state"]


def test_the_health_check_fails_without_a_server(target: Stage) -> None:
    python = Path(sysconfig.get_path("scripts"), "python")
    _, *arguments = target.last_list("HEALTHCHECK")
    closed = [argument.replace(":8000", ":9") for argument in arguments]
    checked = subprocess.run([python, *closed], capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "ConnectError" in checked.stderr
