"""Options of vLLM that are refused: under them tokens would bypass the gate, or nobody has proven otherwise.

Three kinds: tokens that the gate does not see (prompt embeddings, drafts, keys and values from elsewhere);
another model than the one that the experts were checked against; and doors into the engine beside `/admin`,
which vLLM's `--api-key` does not guard.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping

from alter_core.errors import UnsupportedEngineError


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """An option of vLLM that cannot be served with forget experts."""

    option: str
    is_asked_for: Callable[[Namespace], bool]
    reason: str


def _above_one(name: str) -> Callable[[Namespace], bool]:
    return lambda args: (getattr(args, name, None) or 1) > 1


def is_given(*names: str) -> Callable[[Namespace], bool]:
    """Whether one of the options, whose default is none, off or 0, has another value."""
    return lambda args: any(getattr(args, name, None) not in (None, False, "", 0) for name in names)


def _other_than(name: str, *values: str) -> Callable[[Namespace], bool]:
    return lambda args: getattr(args, name) not in values


_UNPROVEN = "it is not proven with forget experts"
_REFUSALS = (
    _Refusal("--pipeline-parallel-size > 1", _above_one("pipeline_parallel_size"), _UNPROVEN),
    _Refusal(
        "data parallelism",
        lambda args: (
            _above_one("data_parallel_size")(args)
            or is_given(
                "data_parallel_external_lb",
                "data_parallel_hybrid_lb",
                "data_parallel_multi_port_external_lb",
            )(args)
            or args.data_parallel_rank is not None
        ),
        "a switch reaches one engine only; run several servers instead",
    ),
    _Refusal(
        "--api-server-count other than 1",
        lambda args: args.api_server_count not in (None, 1),
        "each API process would have its own idea of what is active",
    ),
    _Refusal("--nnodes > 1", _above_one("nnodes"), _UNPROVEN),
    _Refusal(
        "--prefill-context-parallel-size > 1",
        _above_one("prefill_context_parallel_size"),
        _UNPROVEN,
    ),
    _Refusal(
        "--decode-context-parallel-size > 1", _above_one("decode_context_parallel_size"), _UNPROVEN
    ),
    _Refusal(
        "--enable-dbo or --ubatch-size",
        is_given("enable_dbo", "ubatch_size"),
        "the gate routes a step as a whole",
    ),
    _Refusal(
        "--enable-prompt-embeds",
        is_given("enable_prompt_embeds"),
        "prompts without token ids cannot be routed",
    ),
    _Refusal("--enable-lora", is_given("enable_lora", "lora_modules"), _UNPROVEN),
    _Refusal(
        "--speculative-config",
        is_given("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        "a draft model knows nothing of forget experts",
    ),
    _Refusal(
        "--kv-transfer-config or --kv-offloading-size",
        is_given("kv_transfer_config", "kv_offloading_size"),
        "keys and values from before a switch could come back from outside",
    ),
    _Refusal("--ec-transfer-config", is_given("ec_transfer_config"), _UNPROVEN),
    _Refusal(
        "--weight-transfer-config",
        is_given("weight_transfer_config"),
        "experts belong to the base weights they were trained on",
    ),
    _Refusal("--headless", is_given("headless"), "there would be no admin side"),
    _Refusal("--grpc", is_given("grpc", "grpc_port"), "answers would carry no epoch"),
    _Refusal(
        "--worker-cls",
        _other_than("worker_cls", "auto"),
        "ALTER installs itself through its own worker class",
    ),
    _Refusal(
        "--scheduler-cls",
        is_given("scheduler_cls"),
        "a switch asks ALTER's scheduler to recompute requests",
    ),
    _Refusal("--worker-extension-cls", is_given("worker_extension_cls"), _UNPROVEN),
    _Refusal(
        "--model-impl",
        _other_than("model_impl", "auto", "vllm"),
        "experts attach to vLLM's own model classes",
    ),
    _Refusal(
        "--async-scheduling",
        lambda args: args.async_scheduling is True,
        "the gate reads the token ids of a step before it runs",
    ),
    _Refusal(
        "--enable-mm-embeds",
        is_given("enable_mm_embeds"),
        "embeddings without token ids cannot be routed",
    ),
    _Refusal("--runner", _other_than("runner", "auto", "generate"), _UNPROVEN),
    _Refusal("--convert", _other_than("convert", "auto", "none"), _UNPROVEN),
    _Refusal(
        "--kv-sharing-fast-prefill",
        is_given("kv_sharing_fast_prefill"),
        "layers would leave out tokens that the gate has routed",
    ),
    _Refusal("--diffusion-config", is_given("diffusion_config"), _UNPROVEN),
    _Refusal("--engram-config", is_given("engram_config"), _UNPROVEN),
    _Refusal(
        "--hf-overrides, --hf-config-path or --model-class-overrides",
        lambda args: bool(args.hf_overrides or args.hf_config_path or args.model_class_overrides),
        "another model would be served than the one that experts are checked against",
    ),
    _Refusal(
        "--load-format",
        _other_than("load_format", "auto", "hf", "safetensors"),
        "other weights could be served than those that experts are checked against",
    ),
    _Refusal(
        "--enable-sleep-mode",
        is_given("enable_sleep_mode"),
        "weights and experts would be dropped while the server goes on",
    ),
    _Refusal(
        "--enable-elastic-ep or --enable-fault-tolerance",
        is_given("enable_elastic_ep", "enable_fault_tolerance"),
        "an engine that is replaced would come back without experts",
    ),
    _Refusal(
        "--profiler-config",
        lambda args: bool(getattr(args.profiler_config, "profiler", None)),
        "its routes are open to everybody who reaches the port",
    ),
    _Refusal(
        "--enable-scale-out or --tokens-only",
        is_given("enable_scale_out", "tokens_only"),
        "its routes generate, and --api-key does not guard them",
    ),
)

_ONE_ENGINE = "a switch reaches one engine only"
_REFUSED_VARIABLES = {
    "VLLM_USE_RUST_FRONTEND": "it serves HTTP without Python plugins",
    "VLLM_SERVER_DEV_MODE": "it opens worker calls and weight updates to everybody",
    "VLLM_ENABLE_RESPONSES_API_STORE": "it hands out text generated before a switch",
    "VLLM_USE_V2_MODEL_RUNNER": "the gate reads token ids on the V1 model runner",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "adapters on top of experts are not proven",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "messages to the engine could carry code",
    "VLLM_MODEL_REDIRECT_PATH": "another model would be served than the one that was checked",
}


def refused() -> Iterator[tuple[str, str]]:
    """Every option, then every variable, that is refused; and why."""
    yield from ((refusal.option, refusal.reason) for refusal in _REFUSALS)
    yield from _REFUSED_VARIABLES.items()
    yield "VLLM_DP_SIZE > 1", _ONE_ENGINE


def refuse_environment(environ: Mapping[str, str]) -> None:
    """Raises: UnsupportedEngineError for variables of vLLM that ALTER cannot be served with."""
    for name, reason in _REFUSED_VARIABLES.items():
        _refuse_variable(environ, name, reason, ("", "0", "false"))
    _refuse_variable(environ, "VLLM_DP_SIZE", _ONE_ENGINE, ("", "1"))


def _refuse_variable(
    environ: Mapping[str, str], name: str, reason: str, harmless: tuple[str, ...]
) -> None:
    value = environ.get(name, "")
    if value.strip().lower() not in harmless:
        raise UnsupportedEngineError(
            f"{name} cannot be used with forget experts: {reason}",
            expected=f"{name} unset or {harmless[1]}",
            got=value,
            fix=f"Unset {name}.",
        )


def refuse_unproven(args: Namespace) -> None:
    """Raises: UnsupportedEngineError for what would bypass the gate, or is not proven with it."""
    for refusal in _REFUSALS:
        if refusal.is_asked_for(args):
            raise UnsupportedEngineError(
                f"{refusal.option} cannot be used with forget experts: {refusal.reason}",
                expected=f"no {refusal.option}",
                got="it is set",
                fix="Remove it from the command line or the configuration file.",
            )
