"""Rules for the files themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# Where packages and images come from is the user's configuration: no file names a registry's host.
# Written in parts, or this file would.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("npmjs", "org"),
        ("docker", "io"),
        ("docker", "com"),
        ("ghcr", "io"),
        ("gcr", "io"),
        ("quay", "io"),
        ("nvcr", "io"),
        ("public", "ecr", "aws"),
        ("azurecr", "io"),
        ("mcr", "microsoft", "com"),
    )
]


def project_files() -> list[Path]:
    """Every file that is committed or would be."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_registry_host() -> None:
    named = [
        f"{path.relative_to(ROOT)}: {host}"
        for path in project_files()
        for host in REGISTRY_HOSTS
        if host.encode() in path.read_bytes()
    ]
    assert named == []


@pytest.mark.parametrize(
    "script",
    [
        ".ci/run",
        "scripts/setup.sh",
        "scripts/check.sh",
        "scripts/constraints.sh",
        "deploy/secrets.sh",
    ],
)
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_ci_runs_the_checks_and_the_tests() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert {"check", "test"} <= set(command.split())


def test_commit_hooks_download_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
