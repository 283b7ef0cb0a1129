"""What is refused before anything is loaded, and what vLLM is given. Uses vLLM's own parser."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sqlite3
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from alter_core.config import AlterConfig
from alter_core.errors import (
    AuditError,
    AuditTamperedError,
    BaseModelMismatchError,
    BundleNotFoundError,
    BundleTamperedError,
    ConfigError,
    DomainConflictError,
    RegistryMismatchError,
    RegistrySchemaError,
    SubstrateMismatchError,
    UnsupportedEngineError,
    UnsupportedModelError,
)
from alter_core.substrate import Substrate
from server import launch
from server.audit import AuditEntry, AuditLog
from server.registry.migrations import VERSION_TABLE
from server.settings import ServeSettings
from tests.support.tiny import (
    PROVENANCE,
    TinyBundles,
    random_expert,
    random_substrate,
    save_model,
)

MODEL = "/models/base"


@pytest.fixture(autouse=True)
def _spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    # parse_vllm_args sets it, as `vllm serve` does; undo that after each test.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def parsed(*flags: str) -> Namespace:
    return launch.parse_vllm_args(MODEL, flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--pipeline-parallel-size", "2"],
        ["-pp=2"],
        ["--data-parallel-size", "2"],
        ["--data-parallel-rank", "0"],
        ["--data-parallel-external-lb"],
        ["--api-server-count", "2"],
        ["--api-server-count", "0"],
        ["--enable-prompt-embeds"],
        ["--enable-lora"],
        ["--lora-modules", "a=/x"],
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
        ["--speculative-config.method", "ngram"],
        ["--spec-method", "ngram"],
        ["--kv-transfer-config", '{"kv_connector": "X", "kv_role": "kv_both"}'],
        ["--kv-offloading-size", "1"],
        ["--headless"],
        ["--grpc"],
        ["--worker-cls", "some.Worker"],
        ["--scheduler-cls", "some.Scheduler"],
        ["--worker-extension-cls", "some.Extension"],
        ["--model-impl", "transformers"],
        ["--async-scheduling"],
        ["--enable-dbo"],
        ["--ubatch-size", "2"],
        ["--nnodes", "2"],
        ["--decode-context-parallel-size", "2"],
        ["--enable-mm-embeds"],
        ["--runner", "pooling"],
        ["--convert", "embed"],
        ["--kv-sharing-fast-prefill"],
        ["--diffusion-config", "{}"],
        ["--hf-overrides", '{"num_hidden_layers": 1}'],
        ["--hf-config-path", "/other"],
        ["--model-class-overrides", '{"LlamaForCausalLM": "some.Other"}'],
        ["--load-format", "dummy"],
        ["--load-format", "pt"],
        ["--enable-sleep-mode"],
        ["--enable-elastic-ep"],
        ["--enable-fault-tolerance"],
        ["--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/tmp"}'],
        ["--enable-scale-out"],
        ["--tokens-only"],
    ],
    ids=" ".join,
)
def test_unproven_options_are_refused(flags: list[str]) -> None:
    with pytest.raises(UnsupportedEngineError) as caught:
        launch.refuse_unproven(parsed(*flags))
    assert caught.value.fix
    assert caught.value.expected


def test_a_refusal_in_a_configuration_file_counts_too(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("pipeline-parallel-size: 2\n")
    with pytest.raises(UnsupportedEngineError, match="pipeline"):
        launch.refuse_unproven(parsed("--config", str(config)))


def test_ordinary_options_pass() -> None:
    args = parsed(
        "--max-model-len", "512", "--tensor-parallel-size", "2", "--enforce-eager",
        "--api-server-count", "1", "--no-async-scheduling", "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes", "--api-key", "k", "--port", "8001",
    )  # fmt: skip
    launch.refuse_unproven(args)
    assert (args.model, args.max_model_len, args.port) == (MODEL, 512, 8001)


def test_flags_that_vllm_does_not_know_are_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--no-such-flag")
    assert caught.value.code == 2
    assert "alter serve" in capsys.readouterr().err


def test_flags_that_contradict_each_other_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="tool-call-parser"):
        parsed("--enable-auto-tool-choice")


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_USE_RUST_FRONTEND",
        "VLLM_SERVER_DEV_MODE",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_MODEL_REDIRECT_PATH",
    ],
)
def test_environment_that_bypasses_alter_is_refused(name: str) -> None:
    for value in ("1", "true", "junk"):
        with pytest.raises(UnsupportedEngineError, match=name):
            launch.refuse_environment({name: value})
    for value in ("", "0", "False"):
        launch.refuse_environment({name: value})


def test_data_parallelism_by_the_environment_is_refused_too() -> None:
    with pytest.raises(UnsupportedEngineError, match="VLLM_DP_SIZE"):
        launch.refuse_environment({"VLLM_DP_SIZE": "2"})
    launch.refuse_environment({"VLLM_DP_SIZE": "1"})


def test_users_plugins_stay() -> None:
    environ = {"VLLM_PLUGINS": "mine,other"}
    launch.prepare_environment(environ)
    assert environ["VLLM_PLUGINS"] == "mine,other,alter"
    launch.prepare_environment(environ)
    assert environ["VLLM_PLUGINS"] == "mine,other,alter"
    assert environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_unset_plugins_still_mean_all_of_them() -> None:
    environ: dict[str, str] = {}
    launch.prepare_environment(environ)
    names = environ["VLLM_PLUGINS"].split(",")
    assert names[-1] == "alter"
    assert "lora_filesystem_resolver" in names


def test_our_plugin_is_found_as_vllm_finds_it() -> None:
    launch.require_plugin()


def test_a_missing_plugin_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PLUGIN_GROUP", "no.such.group")
    with pytest.raises(ConfigError, match="without forget experts"):
        launch.require_plugin()


@pytest.fixture
def settings(bundles: TinyBundles) -> ServeSettings:
    return ServeSettings(
        substrate=bundles.substrate, domains={"a": bundles.experts["domain-0"]}, max_domains=5
    )


def test_vllm_gets_our_worker_and_keeps_the_users_configuration(
    settings: ServeSettings, substrate: Substrate
) -> None:
    args = parsed("--additional-config", json.dumps({"mine": {"x": 1}}))
    launch.configure(args, settings, substrate)
    assert args.worker_cls == "server.engine.worker.AlterCPUWorker"
    assert args.scheduler_cls == "server.engine.scheduler.AlterScheduler"
    assert args.async_scheduling is False
    assert args.alter_settings is settings
    assert args.additional_config == {
        "mine": {"x": 1},
        "alter": {
            "substrate": str(settings.substrate),
            "substrate_digest": substrate.digest,
            "max_domains": 5,
            "installation": launch.installation_fingerprint(substrate, 5),
        },
    }


def test_the_key_alter_belongs_to_alter(settings: ServeSettings, substrate: Substrate) -> None:
    with pytest.raises(ConfigError, match="belongs to ALTER"):
        launch.configure(parsed("--additional-config", '{"alter": {}}'), settings, substrate)


def test_the_fingerprint_follows_substrate_slots_and_code(
    substrate: Substrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = launch.installation_fingerprint(substrate, 5)
    assert len(first) == 64
    assert launch.installation_fingerprint(substrate, 5) == first
    assert launch.installation_fingerprint(substrate, 6) != first
    (tmp_path / "new.py").write_text("x = 1\n")
    folders = launch._package_folders
    monkeypatch.setattr(launch, "_package_folders", lambda name: [*folders(name), tmp_path])
    assert launch.installation_fingerprint(substrate, 5) != first


def test_artefacts_are_verified_before_loading(
    settings: ServeSettings, bundles: TinyBundles, tmp_path: Path
) -> None:
    assert launch.check_artefacts(bundles.model, settings).digest is not None

    with pytest.raises(BundleNotFoundError):
        launch.check_artefacts(bundles.model, ServeSettings(substrate=tmp_path / "none"))

    torn = tmp_path / "torn"
    shutil.copytree(bundles.experts["domain-0"], torn)
    (torn / "evaluation.json").write_text("{}")
    with pytest.raises(BundleTamperedError):
        launch.check_artefacts(
            bundles.model, ServeSettings(substrate=bundles.substrate, domains={"a": torn})
        )

    same = bundles.experts["domain-0"]
    with pytest.raises(DomainConflictError, match="'a' and 'b'"):
        launch.check_artefacts(
            bundles.model,
            ServeSettings(substrate=bundles.substrate, domains={"a": same, "b": same}),
        )


def test_artefacts_of_another_model_or_substrate_are_refused(
    settings: ServeSettings, substrate: Substrate, bundles: TinyBundles, tmp_path: Path
) -> None:
    other_model = save_model(tmp_path / "model", seed=7)
    with pytest.raises(BaseModelMismatchError):
        launch.check_artefacts(other_model, settings)

    other = random_substrate(bundles.model, substrate.config, seed=8)
    other = other.write(tmp_path / "substrate", name="other", training=PROVENANCE)
    random_expert(other, "a", seed=9).write(tmp_path / "expert", other, training=PROVENANCE)
    with pytest.raises(SubstrateMismatchError):
        launch.check_artefacts(
            bundles.model,
            ServeSettings(substrate=bundles.substrate, domains={"a": tmp_path / "expert"}),
        )


@pytest.mark.parametrize("reading", [{"router": "scalar"}, {"entropy_source": "two_pass"}])
def test_a_substrate_for_ablation_is_refused(
    reading: dict[str, str], substrate: Substrate, bundles: TinyBundles, tmp_path: Path
) -> None:
    config = dataclasses.replace(substrate.config, **reading)
    ablation = random_substrate(bundles.model, config, seed=3)
    ablation.write(tmp_path / "substrate", name="ablation", training=PROVENANCE)
    with pytest.raises(UnsupportedEngineError, match="reference path only"):
        launch.check_artefacts(bundles.model, ServeSettings(substrate=tmp_path / "substrate"))


def test_an_unsupported_architecture_is_refused(settings: ServeSettings, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM"):
        launch.check_artefacts(tmp_path, settings)


def test_folders_and_hub_names_are_told_apart(
    bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundles.model.parent)
    for model in (str(bundles.model), "model", "./none", "/none"):
        assert launch.is_local(model)
    for model in ("org/model", "none"):
        assert not launch.is_local(model)


def test_a_hub_model_is_pinned_to_the_checked_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    args = launch.parse_vllm_args("org/name", ["--revision", "abc"])
    assert launch.fetch_model(args) == tmp_path
    assert (asked["model"], asked["revision"]) == ("org/name", "abc")
    assert (args.model, args.served_model_name) == (str(tmp_path), ["org/name"])


@pytest.mark.parametrize("model", ["no-such-org/no-such-model", "not a name", "a/b/c"])
def test_a_model_that_is_nowhere_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    args = launch.parse_vllm_args(model, ["--download-dir", str(tmp_path)])
    with pytest.raises(UnsupportedModelError, match="neither a folder"):
        launch.fetch_model(args)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """What vLLM would be started with."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    started: list[Namespace] = []
    monkeypatch.setattr(launch, "_run", started.append)
    return started


def test_a_refusal_comes_before_the_engine(
    settings: ServeSettings, bundles: TinyBundles, started: list[Namespace]
) -> None:
    with pytest.raises(UnsupportedModelError):
        launch.serve(str(bundles.model / "none"), settings, [])
    with pytest.raises(UnsupportedEngineError):
        launch.serve(str(bundles.model), settings, ["--enable-lora"])
    assert started == []
    launch.serve(str(bundles.model), settings, ["--max-model-len", "64"])
    assert started[0].alter_settings is settings
    assert (started[0].model, started[0].served_model_name) == (str(bundles.model), None)


def test_json_logs_follow_vllms_own_flags(
    settings: ServeSettings,
    bundles: TinyBundles,
    started: list[Namespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    applied: list[dict[str, Any]] = []
    monkeypatch.setattr("logging.config.dictConfig", applied.append)
    flags = ["--max-model-len", "64", "--log-level", "WARNING"]
    flags += ["--disable-access-log-for-endpoints", "/metrics"]
    launch.serve(str(bundles.model), dataclasses.replace(settings, log_format="json"), flags)
    [args] = started
    written = json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    assert written == applied[-1]
    assert written["loggers"]["vllm"]["level"] == "WARNING"
    assert written["filters"]["excluded"]["excluded_paths"] == ["/metrics"]

    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
    from vllm.logger import configure_logging_from_args

    config = configure_logging_from_args(args)
    assert config.pylogging_config_file == os.environ["VLLM_LOGGING_CONFIG_PATH"]
    assert get_uvicorn_log_config(args) == written
    own = ["--logging-config.pylogging_config_file", str(bundles.model / "config.json")]
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "")
    with pytest.raises(ConfigError, match="Two logging configurations"):
        launch.serve(str(bundles.model), dataclasses.replace(settings, log_format="json"), own)


def test_vllm_has_the_flag_that_switches_tracing_on() -> None:
    assert parsed().otlp_traces_endpoint is None
    endpoint = "http://collector:4317"
    assert parsed("--otlp-traces-endpoint", endpoint).otlp_traces_endpoint == endpoint


def test_without_an_audit_log_or_the_tokens_file_nothing_is_started(
    settings: ServeSettings,
    bundles: TinyBundles,
    started: list[Namespace],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("not a database")
    for audit_log in (tmp_path / "file", tmp_path / "file" / "audit.sqlite", tmp_path):
        with pytest.raises(AuditError, match="cannot be written"):
            launch.serve(str(bundles.model), dataclasses.replace(settings, audit_log=audit_log), [])
    with pytest.raises(ConfigError, match="tokens file"):
        launch.serve(
            str(bundles.model), dataclasses.replace(settings, tokens_file=tmp_path / "none"), []
        )

    log = AuditLog.open(tmp_path / "audit.sqlite")
    for _ in range(2):
        log.append(
            AuditEntry(
                actor="alice",
                request_id="r",
                action="activate",
                domain="a",
                epoch_before=0,
                epoch_after=1,
                digest=None,
                reason=None,
                outcome="created",
                error=None,
            )
        )
    connection = sqlite3.connect(tmp_path / "audit.sqlite")
    connection.execute("DROP TRIGGER audit_records_no_update")
    connection.execute("UPDATE audit_records SET actor = 'bob' WHERE sequence = 2")
    connection.commit()
    connection.close()
    broken = dataclasses.replace(settings, audit_log=tmp_path / "audit.sqlite")
    with pytest.raises(AuditTamperedError, match="record 2 was changed"):
        launch.serve(str(bundles.model), broken, [])
    assert started == []


def test_a_registry_of_another_substrate_or_a_newer_version_stops_the_start(
    settings: ServeSettings,
    bundles: TinyBundles,
    started: list[Namespace],
    tmp_path: Path,
) -> None:
    shared = dataclasses.replace(settings, registry=f"sqlite:///{tmp_path / 'registry.sqlite'}")
    for _ in range(2):
        launch.serve(str(bundles.model), shared, [])
    assert len(started) == 2

    config = AlterConfig(tap_layer=1, rank=4, lora_alpha=8.0, evidence_window=16)
    other = random_substrate(bundles.model, config)
    other.write(tmp_path / "other", name="other", training=PROVENANCE)
    foreign = dataclasses.replace(shared, substrate=tmp_path / "other", domains={})
    with pytest.raises(RegistryMismatchError, match="another base model or substrate"):
        launch.serve(str(bundles.model), foreign, [])

    connection = sqlite3.connect(tmp_path / "registry.sqlite")
    with connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.close()
    with pytest.raises(RegistrySchemaError):
        launch.serve(str(bundles.model), shared, [])
    with pytest.raises(ConfigError, match="URL"):
        launch.serve(str(bundles.model), dataclasses.replace(shared, registry="mysql://h/d"), [])
    assert len(started) == 2
