"""Starts vLLM's own API server with ALTER inside.

Everything that can be refused is refused here, before any weight is loaded: options under which
tokens would bypass the gate or that are not proven with it, a substrate of another model, an expert
of another substrate, more slots than fit into memory, a registry of another model or of a newer version,
an audit log or a tokens file that cannot be used.
vLLM swallows a plugin's import error and would serve without it; so that is checked too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from alter_core.errors import (
    ConfigError,
    DomainConflictError,
    UnsupportedModelError,
)
from alter_core.fingerprint import BaseModelInfo
from alter_core.substrate import ForgetExpert, Substrate
from server import memory
from server.audit import AuditLog
from server.engine.base import check_servable
from server.engine.evidence_tables import cache_bytes
from server.logs import JsonLogs
from server.parts import open_registry, open_store
from server.refusals import is_given, refuse_environment, refuse_unproven
from server.settings import ServeSettings
from server.tokens import TokenStore

PLUGIN = "alter"
PLUGIN_GROUP = "vllm.endpoint_plugins"
_FILTERED_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
"""Groups that VLLM_PLUGINS filters, and that load everything while it is unset."""
_SOURCES = (".py", ".cpp", ".h")
_OTHER_WEIGHT_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]


def serve(model: str, settings: ServeSettings, vllm_args: Sequence[str]) -> None:
    """Serves `model` until the process is told to stop. Raises: as `prepare`, and EngineError later."""
    _run(prepare(model, settings, vllm_args))


def prepare(model: str, settings: ServeSettings, vllm_args: Sequence[str]) -> Namespace:
    """Checks everything that can be checked before the engine, and returns vLLM's arguments with ours.

    Raises: ConfigError, UnsupportedEngineError, UnsupportedModelError, BundleError, DomainError,
    RegistryError or AuditError; SystemExit for flags that vLLM does not know.
    """
    refuse_environment(os.environ)
    logs = JsonLogs.begin() if settings.log_format == "json" else None
    prepare_environment(os.environ)
    require_plugin()
    check_records(settings)
    substrate = check_artefacts(Path(model), settings) if is_local(model) else None
    args = parse_vllm_args(model, vllm_args)
    refuse_unproven(args)
    if logs is not None:
        logs.follow(args)
    if substrate is None:
        substrate = check_artefacts(fetch_model(args), settings)
    check_memory(args, settings.max_domains, substrate)
    check_registry(settings, substrate)
    configure(args, settings, substrate)
    return args


@contextlib.asynccontextmanager
async def application(args: Namespace) -> AsyncIterator[FastAPI]:
    """vLLM's application over an engine of its own, for whoever listens in another way than `serve`.

    `args` are of `prepare`. Its lifespan has to be run, and has ended before this does.
    Raises: as `AlterEndpointPlugin.init_state`.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    async with build_async_engine_client(args) as engine_client:
        tasks = await engine_client.get_supported_tasks()
        app: FastAPI = build_app(args, tasks, engine_client.model_config)
        await init_app_state(engine_client, app.state, args, tasks)
        yield app


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Sets what vLLM reads from the environment, for this process and its workers."""
    environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    given = environ.get("VLLM_PLUGINS")
    if given is None:
        # Unset means all of these groups; once it is set, it has to name them.
        names = [
            e.name
            for group in _FILTERED_GROUPS
            for e in importlib.metadata.entry_points(group=group)
        ]
    else:
        names = [name for name in given.split(",") if name]
    environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN]))


def require_plugin() -> None:
    """Raises: ConfigError unless vLLM will find and load our plugin."""
    from server.plugin import AlterEndpointPlugin

    found = [e for e in importlib.metadata.entry_points(group=PLUGIN_GROUP) if e.name == PLUGIN]
    if not found or any(entry.load() is not AlterEndpointPlugin for entry in found):
        raise ConfigError(
            "vLLM would not load ALTER's plugin and would serve without forget experts",
            expected=f"an entry point {PLUGIN!r} in the group {PLUGIN_GROUP}",
            got=", ".join(entry.value for entry in found) or "none",
            fix="Install the package, e.g. `pip install -e .`.",
        )


def parse_vllm_args(model: str, vllm_args: Sequence[str]) -> Namespace:
    """vLLM's own flags, parsed by its own parser, as `vllm serve` does.

    Raises: SystemExit(2) for unknown flags; ConfigError for values that contradict each other.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="alter serve"))
    try:
        args: Namespace = parser.parse_args([model, *vllm_args])
        args.model = model
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "vLLM does not accept these flags", got=str(error), fix="See `alter serve --help`."
        ) from error
    return args


def is_local(model: str) -> bool:
    """True for a folder, or what can only be one; False for the name of a hub model."""
    return Path(model).exists() or model.startswith(("/", "./", "../"))


def fetch_model(args: Namespace) -> Path:
    """The folder of a hub model, fetched if need be. vLLM will serve that very folder.

    Raises: UnsupportedModelError if it cannot be had.
    """
    model: str = args.model
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=args.revision,
            cache_dir=args.download_dir,
            ignore_patterns=_OTHER_WEIGHT_FORMATS,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UnsupportedModelError(
            f"The model {model!r} is neither a folder nor available from the hub",
            expected="a local folder, or the name of a hub model",
            got=type(error).__name__,
            fix="Check the name and the network; with HF_HUB_OFFLINE=1 it must be in the cache.",
        ) from error
    args.served_model_name = args.served_model_name or [model]
    args.model = args.model_tag = folder
    return Path(folder)


def check_records(settings: ServeSettings) -> None:
    """Raises: AuditError, ConfigError for an audit log or a tokens file that cannot be used."""
    AuditLog.open(settings.audit_log)
    if settings.tokens_file is not None:
        TokenStore(settings.tokens_file).load()


def check_artefacts(model: Path, settings: ServeSettings) -> Substrate:
    """Reads and verifies the substrate against the model, and every start-up expert against both.

    Raises: UnsupportedModelError, UnsupportedEngineError, BundleError, DomainConflictError.
    """
    signatures, base_model = settings.security.signatures, BaseModelInfo.from_folder(model)
    substrate = signatures.read(
        settings.substrate, lambda folder: Substrate.read(folder, base_model)
    )
    check_servable(substrate.config)
    names: dict[str, str] = {}
    for name, folder in settings.domains.items():
        expert = signatures.read(folder, lambda folder: ForgetExpert.read(folder, substrate))
        digest = str(expert.digest)
        if digest in names:
            raise DomainConflictError(
                f"The forget domains {names[digest]!r} and {name!r} name the same bundle",
                expected="each bundle under one name",
                got=digest,
                fix="Remove one --alter-domain.",
            )
        names[digest] = name
    return substrate


def check_registry(settings: ServeSettings, substrate: Substrate) -> None:
    """Joins the registry, or founds it, and looks at the store.

    Raises: ConfigError, RegistrySchemaError, RegistryMismatchError, RegistryUnavailableError.
    """
    open_registry(settings, substrate).close()
    open_store(settings, substrate)


def served_value_bytes(dtype: str, supported: Sequence[torch.dtype]) -> int:
    """Bytes of one number under `--dtype`. `supported`: what the platform serves, best first.

    vLLM's `auto` keeps a checkpoint's 16-bit dtype, and serves anything else, or what the platform
    lacks, in the best supported one. x86 CPUs without bf16 instructions compute bf16 by other ones.

    Raises: ConfigError for a dtype that the platform lacks.
    """
    from vllm.config.model import str_dtype_to_torch_dtype

    if dtype == "auto":
        return supported[0].itemsize
    wanted: torch.dtype = str_dtype_to_torch_dtype(dtype)
    if wanted not in supported:
        names = [str(each).removeprefix("torch.") for each in supported]
        raise ConfigError(
            f"This machine cannot serve --dtype {dtype}",
            expected=" or ".join(names),
            got=dtype,
            fix=f"Serve with --dtype {names[0]}, or without --dtype.",
        )
    return wanted.itemsize


def check_memory(args: Namespace, max_domains: int, substrate: Substrate) -> None:
    """Raises: ConfigError for more slots than fit beside the model, or a dtype that cannot be served.

    Several ranks on CPU share the host's memory alike; on GPUs each has a device of its own.
    """
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit

    value_bytes = served_value_bytes(args.dtype, current_platform.supported_dtypes)
    num_ranks, is_cpu = args.tensor_parallel_size, current_platform.is_cpu()
    kv_cache_bytes: int | None = args.kv_cache_memory_bytes
    if is_cpu:
        kv_cache_bytes = memory.cpu_kv_cache_bytes(kv_cache_bytes, os.environ)
        total, available = memory.host_memory(get_cgroup_memory_limit())
        # vLLM sizes its cache by the total, unless it is given.
        memory_bytes = (total if kv_cache_bytes is None else available) // num_ranks
    else:
        memory_bytes = current_platform.get_device_total_memory()
    is_offloaded = is_given("cpu_offload_gb", "offload_group_size")(args)
    weights_bytes = memory.weight_bytes(
        Path(args.model),
        value_bytes=value_bytes,
        is_quantised_at_loading=args.quantization is not None,
    )
    memory.check_slots(
        max_domains,
        memory.SlotCost.estimate(
            substrate.config,
            substrate.sites,
            hidden_size=substrate.base_model.hidden_size,
            tensor_parallel_size=num_ranks,
            value_bytes=value_bytes,
            cache_bytes=cache_bytes(
                substrate.config,
                vocab_size=substrate.base_model.vocab_size,
                max_domains=max_domains,
            )
            if is_cpu
            else 0,
        ),
        memory.Room(
            memory_bytes=memory_bytes,
            utilization=args.gpu_memory_utilization,
            weights_bytes=0 if is_offloaded else weights_bytes // num_ranks,
            kv_cache_bytes=kv_cache_bytes,
        ),
    )


def configure(args: Namespace, settings: ServeSettings, substrate: Substrate) -> None:
    """Puts ALTER into vLLM's arguments. What the user set in `--additional-config` stays.

    Raises: ConfigError if that has a key `alter`.
    """
    from vllm.platforms import current_platform

    additional: dict[str, Any] = dict(args.additional_config or {})
    if PLUGIN in additional:
        raise ConfigError(
            "--additional-config has a key that belongs to ALTER",
            expected=f"no key {PLUGIN!r}",
            got=repr(additional[PLUGIN]),
            fix="Use the --alter-* flags.",
        )
    additional[PLUGIN] = {
        "substrate": str(settings.substrate),
        "substrate_digest": substrate.digest,
        "max_domains": settings.max_domains,
        "installation": installation_fingerprint(substrate, settings.max_domains),
    }
    args.additional_config = additional
    worker = "AlterCPUWorker" if current_platform.is_cpu() else "AlterGPUWorker"
    args.worker_cls = f"server.engine.worker.{worker}"
    args.scheduler_cls = "server.engine.scheduler.AlterScheduler"
    args.async_scheduling = False
    args.api_server_count = None
    args.alter_settings = settings
    args.alter_admin_listener = _bind_admin(settings, args)


def _bind_admin(settings: ServeSettings, args: Namespace) -> socket.socket | None:
    """Raises: ConfigError."""
    where = settings.security.admin_port
    if where is None:
        return None
    if where.port == args.port and args.uds is None:
        raise ConfigError(
            "The admin port is the one that serves",
            expected="a port of its own",
            got=f"{where.port} for both",
            fix="Set --alter-admin-port or --port.",
        )
    return where.bind()


def installation_fingerprint(substrate: Substrate, max_domains: int) -> str:
    """SHA-256 over what is installed into the model: substrate, slots and our own code.

    vLLM hashes it into the key of its compile cache, which would otherwise hold one entry for a
    model with and without experts.
    """
    digest = hashlib.sha256(f"{substrate.digest}\n{max_domains}\n".encode())
    for package in ("alter_core", "server.engine"):
        for folder in _package_folders(package):
            for file in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES):
                digest.update(f"{package}/{file.relative_to(folder)}\n".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _package_folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return [Path(folder) for folder in spec.submodule_search_locations or ()]


def _run(args: Namespace) -> None:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    ours, theirs = logging.getLogger("server"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:  # or a configuration file has taken care of ours
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)
    uvloop.run(run_server(args))
