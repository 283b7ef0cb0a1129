"""The frozen base model's own S_q at every token, in one pass, kept on disk.

Position j's entropy belongs to input token x_j: it is that of the model's distribution after reading x_j.

Legend: T tokens of all rows, D hidden.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from alter_core.entropy import tsallis_entropy
from alter_core.sites import decoder_layers

from .base_model import BaseModel
from .batches import by_length, make_batch
from .checkpoint import write_atomically
from .dataset import EncodedRow

_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyPass:
    """`entropy[i]` (T_i,) of row i; `hidden_states` (T, D) at the tap layer's input, rows in order."""

    entropy: list[Tensor]
    hidden_states: Tensor


@torch.inference_mode()
def run_entropy_pass(
    base: BaseModel, rows: Sequence[EncodedRow], *, tsallis_q: float, tap_layer: int
) -> EntropyPass:
    """Runs the base model once over the rows."""
    captured: list[Tensor] = []
    handle = decoder_layers(base.model)[tap_layer].register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    entropy: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}
    try:
        for indices in by_length(rows, _BATCH_TOKENS):
            batch = make_batch(rows, indices, base.pad_id).to(base.device)
            captured.clear()
            logits = base.logits(batch)
            values = tsallis_entropy(logits, tsallis_q).cpu()
            states = captured[0].cpu()
            for place, index in enumerate(indices):
                length = len(rows[index].ids)
                entropy[index] = values[place, :length].clone()
                hidden[index] = states[place, :length]
    finally:
        handle.remove()
    return EntropyPass(
        entropy=[entropy[index] for index in range(len(rows))],
        hidden_states=torch.cat([hidden[index] for index in range(len(rows))]),
    )


def cached_entropy(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    *,
    tsallis_q: float,
    tap_layer: int,
    folder: Path,
) -> list[Tensor]:
    """S_q of every token, from `folder` if an earlier run left it there. A torn file is written again."""
    key = _cache_key(base, rows, tsallis_q)
    path = folder / f"entropy-{key}.safetensors"
    lengths = [len(row.ids) for row in rows]
    try:
        stored = safetensors.torch.load(path.read_bytes())["entropy"]
    except (OSError, KeyError, safetensors.SafetensorError):
        stored = None
    if stored is None or stored.shape != (sum(lengths),):
        passed = run_entropy_pass(base, rows, tsallis_q=tsallis_q, tap_layer=tap_layer)
        stored = torch.cat(passed.entropy)
        write_atomically(path, safetensors.torch.save({"entropy": stored}))
    return list(stored.split(lengths))


def _cache_key(base: BaseModel, rows: Sequence[EncodedRow], tsallis_q: float) -> str:
    key = {
        "base": base.info.fingerprint,
        "rows": [row.ids for row in rows],
        "q": tsallis_q,
        "mixed_precision": base.mixed_precision,
        "device": base.device.type,
    }
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
