"""Eq. 9 on a transformers model: the reference path of training, evaluation and parity tests.

Forward hooks add the experts' delta to each adapted linear; nothing of the model is replaced, and
`detach()` leaves it as it was.

Legend: B batch, T new tokens, P past tokens, D hidden, R rank, N domains, E = 1 + N experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .bundle import SiteInfo
from .config import AlterConfig
from .entropy import tsallis_entropy
from .errors import ConfigError, UnsupportedModelError
from .evidence import NO_EVIDENCE, windowed_max
from .router import expert_weights, scalar_logits
from .sites import check_architecture, decoder_layers, iter_sites
from .substrate import ForgetExpert, Substrate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How the tokens of one forward pass were routed. Shapes: (B, T, N), (B, T), (B, T), (B, T, E)."""

    domain_logits: Tensor
    entropy: Tensor
    is_high: Tensor
    weights: Tensor


def measure_sites(model: nn.Module, config: AlterConfig) -> dict[str, SiteInfo]:
    """Name and size of every site of a transformers model.

    Raises: UnsupportedModelError if the architecture, a target module or `tap_layer` does not fit.
    """
    check_architecture(type(model).__name__)
    return {
        f"layers.{layer}.{kind}": SiteInfo(
            in_features=_linear(linears[0]).in_features,
            out_features=sum(_linear(linear).out_features for linear in linears),
        )
        for layer, kind, linears in iter_sites(model, config)
    }


class AttachedModel:
    """A transformers causal LM with a substrate and forget experts attached.

    Use the model as always; every forward applies Eq. 9. Batches may be padded on either side, if
    `attention_mask` says so. With a KV cache the token history is kept from call to call.
    """

    def __init__(
        self, model: PreTrainedModel, substrate: Substrate, experts: Sequence[ForgetExpert] = ()
    ) -> None:
        """Raises: UnsupportedModelError if the substrate's sites are not those of the model."""
        self.model = model
        self.substrate = substrate
        self.experts = list(experts)
        self.is_enabled = True
        self.routing: Routing | None = None
        if measure_sites(model, substrate.config) != substrate.sites:
            raise UnsupportedModelError(
                "The substrate's sites are not those of this model",
                expected=f"{len(substrate.sites)} sites of the substrate's base model",
                got=f"{type(model).__name__} with other sizes",
            )
        self._history = torch.empty(0, 0, dtype=torch.long)
        self._history_mask = torch.empty(0, 0, dtype=torch.bool)
        self._shrunk: dict[str, tuple[Tensor, Tensor]] = {}
        self._pending: tuple[Tensor, Tensor | None] | None = None
        self._handles = list(self._register())

    def detach(self) -> None:
        """Removes every hook; the model is the base model again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, inside the block."""
        before, self.is_enabled = self.is_enabled, False
        try:
            yield
        finally:
            self.is_enabled = before

    def evidence_logits(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Router logits of every domain from token ids alone. Shapes: (B, T) -> (B, T, N)."""
        embeddings = self.substrate.normalise(self.model.get_input_embeddings()(input_ids))
        if mask is not None:
            embeddings = embeddings * mask.unsqueeze(-1)
        scores = [expert.evidence(embeddings) for expert in self.experts]
        if not scores:
            return embeddings.new_empty((*input_ids.shape, 0))
        evidence = torch.stack(scores, dim=-1)
        if mask is not None:
            evidence = evidence.masked_fill(~mask.unsqueeze(-1), NO_EVIDENCE)
        return windowed_max(evidence, self.substrate.config.evidence_window)

    def _register(self) -> Iterator[Any]:
        config = self.substrate.config
        layers = decoder_layers(self.model)
        # The decoder, not the head around it: it may be run alone, and gets its masks by name.
        yield self.model.base_model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        yield layers[config.tap_layer].register_forward_pre_hook(self._before_tap, with_kwargs=True)
        for layer, kind, linears in iter_sites(self.model, config):
            site, start = f"layers.{layer}.{kind}", 0
            for linear in linears:
                stop = start + _linear(linear).out_features
                yield linear.register_forward_hook(_LinearHook(self, site, start, stop))
                start = stop

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._shrunk.clear()
        self.routing = None
        if not self.is_enabled:
            # A cache filled meanwhile holds other tokens than the history does.
            self._history = self._history[:0]
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise ConfigError(
                "The model was called without token ids, so nothing could be routed",
                expected="input_ids",
                got="inputs_embeds",
                fix="Pass input_ids.",
            )
        past = kwargs.get("past_key_values")
        num_past = past.get_seq_length() if past is not None else 0
        ids, mask = self._with_history(input_ids, kwargs.get("attention_mask"), num_past)
        # The gate is float32 even where the caller runs the model under autocast.
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            logits = self.evidence_logits(ids, mask)[:, num_past:]
            entropy = None
            if self.substrate.config.entropy_source == "two_pass":
                entropy = self._exact_entropy(ids, mask)[:, num_past:]
        self._pending = (logits, entropy)

    def _with_history(
        self, input_ids: Tensor, mask: Tensor | None, num_past: int
    ) -> tuple[Tensor, Tensor]:
        new_mask = torch.ones_like(input_ids, dtype=torch.bool)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ConfigError(
                    "The attention mask does not tell padding from text",
                    expected="shape (batch, tokens)",
                    got=str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__,
                )
            new_mask = mask[:, -input_ids.shape[1] :].bool()
        if num_past == 0:
            self._history, self._history_mask = input_ids, new_mask
        elif self._history.shape != (input_ids.shape[0], num_past):
            raise ConfigError(
                "The KV cache holds tokens that this model was not shown",
                expected=f"a cache of {tuple(self._history.shape)} tokens",
                got=f"{(input_ids.shape[0], num_past)}",
                fix="Start generation from the prompt's token ids, without beam reordering.",
            )
        else:
            self._history = torch.cat([self._history, input_ids], dim=1)
            self._history_mask = torch.cat([self._history_mask, new_mask], dim=1)
        return self._history, self._history_mask

    def _exact_entropy(self, ids: Tensor, mask: Tensor) -> Tensor:
        history = self._history, self._history_mask
        with self.disabled():
            output = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        self._history, self._history_mask = history
        return tsallis_entropy(output.logits, self.substrate.config.tsallis_q)

    def _before_tap(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_enabled or self._pending is None:
            return
        logits, entropy = self._pending
        self._pending = None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        config = self.substrate.config
        with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
            if entropy is None:
                entropy = self.substrate.estimator(hidden_states)
            if config.router == "scalar":
                weight = torch.tensor(
                    [e.scalar_weight for e in self.experts], device=entropy.device
                )
                logits = scalar_logits(entropy, weight)
            is_high = entropy > config.entropy_threshold
            weights = expert_weights(logits, is_high, config)
        self.routing = Routing(
            domain_logits=logits, entropy=entropy, is_high=is_high, weights=weights
        )

    def site_delta(self, site: str, x: Tensor, start: int, stop: int) -> Tensor | None:
        """Delta for rows `start:stop` of a site's stacked output, or None where nothing applies.

        Shapes: x (B, T, I) -> (B, T, stop - start).
        """
        if not self.is_enabled or self.routing is None:
            return None
        weights, total = self.routing.weights, None
        retain = self.substrate.retain_lora_b.get(site)
        lora_bs = [retain, *(expert.lora_b[site] for expert in self.experts)]
        for index, lora_b in enumerate(lora_bs):
            if lora_b is None or not bool(weights[..., index].any()):
                continue
            scale = weights[..., index, None] * self.substrate.config.scaling
            gated = (self._shrink(site, x) * scale).to(x.dtype)
            delta = gated @ lora_b[start:stop].to(x).T
            total = delta if total is None else total + delta
        return total

    def _shrink(self, site: str, x: Tensor) -> Tensor:
        """A x, computed once for the linears that read the same x."""
        cached = self._shrunk.get(site)
        if cached is None or cached[0] is not x:
            cached = (x, x @ self.substrate.lora_a[site].to(x).T)
            self._shrunk[site] = cached
        return cached[1]


class _LinearHook:
    """Adds the delta of one linear's share of its site."""

    def __init__(self, attached: AttachedModel, site: str, start: int, stop: int) -> None:
        self.attached, self.site, self.start, self.stop = attached, site, start, stop

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        delta = self.attached.site_delta(self.site, args[0], self.start, self.stop)
        return output if delta is None else output + delta


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            "An adapted module is not a plain linear layer",
            expected="torch.nn.Linear",
            got=type(module).__name__,
            fix="Train on the unquantised base model.",
        )
    return module
