"""A worker whose hook does nothing, as if stale compiled code ran in its place."""

from __future__ import annotations

from typing import Any

from server.engine.hook import ExpertLinearMethod
from server.engine.worker import AlterCPUWorker


class InertWorker(AlterCPUWorker):
    """Installs ALTER, then takes the wrapped linears out again at one site, or at all."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        only = self.vllm_config.additional_config["inert_site"]
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, ExpertLinearMethod) and only in (None, method.site_name):
                module.quant_method = method.base
