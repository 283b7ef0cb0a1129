"""Routes of vLLM that reach into the engine beside `/admin`: none of them answers, whatever opens them.

`server.refusals` refuses the options that would open most of them; one (`/scale_elastic_ep`) always stands
there. `--api-key` guards only `/v1`.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse

CLOSED_ROUTES = frozenset(
    (
        "/abort_requests",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/finish_weight_update",
        "/get_world_size",
        "/init_weight_transfer_engine",
        "/is_paused",
        "/is_scaling_elastic_ep",
        "/is_sleeping",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/server_info",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
        "/weight_info",
    )
)


def closed() -> JSONResponse:
    """404 in the shape of OpenAI's errors."""
    error = {
        "message": "This route reaches into the engine; a server with forget experts does not have it.",
        "type": "NotFoundError",
        "param": None,
        "code": int(HTTPStatus.NOT_FOUND),
    }
    return JSONResponse({"error": error}, status_code=HTTPStatus.NOT_FOUND)
