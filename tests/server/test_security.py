"""Flags and variables of `server.security`, and what they refuse before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alter_core.errors import BundleSignatureError, BundleSourceError, ConfigError
from server import launch
from server.security import SecurityFlags
from server.settings import ServeSettings
from server.signatures import SignaturePolicy, sign_bundle
from tests.support.keys import make_key_pair
from tests.support.tiny import TinyBundles, make_bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    return make_bundles(tmp_path_factory.mktemp("tiny"), num_experts=1)


def build(substrate: Path, **flags: object) -> ServeSettings:
    return ServeSettings.build(substrate=substrate, security=SecurityFlags(**flags))  # type: ignore[arg-type]


def test_without_flags_bundles_may_lie_beside_the_substrate_and_nobody_signs(
    tmp_path: Path,
) -> None:
    security = build(tmp_path / "a" / "substrate").security
    assert security.sources.resolve(str(tmp_path / "a" / "b")) == str(tmp_path / "a" / "b")
    with pytest.raises(BundleSourceError):
        security.sources.resolve(str(tmp_path / "b"))
    assert (security.signatures, security.admin_port) == (SignaturePolicy(), None)
    with pytest.raises(BundleSourceError):
        build(Path("/substrate")).security.sources.resolve("/etc")


def test_flags_come_before_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [make_key_pair(tmp_path, name).public for name in ("one", "two")]
    monkeypatch.setenv("ALTER_TRUSTED_KEYS", f"{keys[0]},{keys[1]}")
    monkeypatch.setenv("ALTER_SIGNATURES", "warn")
    monkeypatch.setenv("ALTER_BUNDLE_SOURCES", f"{tmp_path}/with space, s3://bucket/experts")
    monkeypatch.setenv("ALTER_ADMIN_PORT", "8443")
    security = build(tmp_path / "substrate").security
    assert security.signatures == SignaturePolicy(mode="warn", trusted_keys=tuple(keys))
    assert security.sources.folders == (tmp_path / "with space",)
    assert security.sources.sources == ("s3://bucket/experts",)
    assert security.admin_port is not None
    assert (security.admin_port.host, security.admin_port.port) == ("127.0.0.1", 8443)

    flags = {"signatures": "require", "trusted_keys": (keys[1],), "admin_port": 8444}
    security = build(tmp_path / "substrate", **flags).security
    assert security.signatures == SignaturePolicy(mode="require", trusted_keys=(keys[1],))
    assert security.admin_port is not None
    assert security.admin_port.port == 8444


def test_options_of_an_admin_port_without_one_are_refused(tmp_path: Path) -> None:
    for flags in ({"admin_host": "127.0.0.1"}, {"admin_certfile": tmp_path / "cert.pem"}):
        with pytest.raises(ConfigError, match="no port"):
            build(tmp_path / "substrate", **flags)


def test_the_admin_port_is_not_the_one_that_serves(
    bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    settings = build(bundles.substrate, admin_port=8000)
    args = launch.parse_vllm_args(str(bundles.model), ["--port", "8000"])
    substrate = launch.check_artefacts(bundles.model, settings)
    with pytest.raises(ConfigError, match="the one that serves"):
        launch.configure(args, settings, substrate)


def test_substrate_and_start_up_experts_must_be_signed(
    bundles: TinyBundles, tmp_path: Path
) -> None:
    keys, others = make_key_pair(tmp_path, "trusted"), make_key_pair(tmp_path, "another")
    substrate = Path(shutil.copytree(bundles.substrate, tmp_path / "substrate"))
    expert = Path(shutil.copytree(bundles.experts["domain-0"], tmp_path / "expert"))
    settings = ServeSettings.build(
        substrate=substrate,
        domains=[f"a={expert}"],
        security=SecurityFlags(trusted_keys=(keys.public,)),
    )
    for folder in (substrate, expert):
        with pytest.raises(BundleSignatureError, match=f"{folder} is not signed"):
            launch.check_artefacts(bundles.model, settings)
        sign_bundle(folder, others.private)
        with pytest.raises(BundleSignatureError, match=f"{folder} does not verify"):
            launch.check_artefacts(bundles.model, settings)
        sign_bundle(folder, keys.private)
    assert launch.check_artefacts(bundles.model, settings).digest is not None
