"""Seconds and FLOPs of unlearning 400 pairs, and what they buy: ALTER, AsymLoRA, LoRA, full fine-tuning.

    python -m benchmarks.tofu.timing        docs/results/tofu-timing.{json,md}

The rows are those of forget10, of a base model that knows 20 other authors beside them. Everything sees them
as often, in the same batches, one after another. Seconds are processor time, on one thread unless told
otherwise: waiting for the processor is left out, slower memory beside other load is not.
Gradient ascent updates all weights and has no retained rows. LoRA and asymmetric LoRA act on every token, so
they need a retain term beside the forget term, which is ALTER's; ALTER needs a router instead.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from alter_core.config import AlterConfig
from alter_core.evidence import EvidenceHead
from alter_core.sites import default_tap_layer
from alter_core.substrate import Substrate
from alter_eval import tofu
from alter_eval.data import default_data_dir
from alter_eval.models import TransformersModel
from trainer.base_model import BaseModel, load_base_model
from trainer.batches import at_step, make_batch
from trainer.counterfactual import Counterfactuals
from trainer.dataset import EncodedRow
from trainer.entropy_pass import cached_entropy
from trainer.experts import ExpertTraining, select_answer_tokens
from trainer.losses import LossTerm, answer_nll
from trainer.router import EvidenceSettings, train_evidence
from trainer.settings import ExpertSettings
from trainer.substrate import initial_substrate, normalised_embeddings

from .experiment import Bench, Figures, encoded_files
from .options import parsed, table_parser
from .splits import HALF, SPLITS, load_split
from .table import write_table

_FLOP_STEPS = 3
_QUALITY = (
    "forget_quality",
    "forget_loss_ks_p",
    "forget_nll",
    "forget_Q_A_ROUGE",
    "repetition_rate",
    "model_utility",
)
"""What is measured of every method's result, besides its cost."""
_ASCENT_RATE = 1e-5
_UNGATED_RATE = 1e-3
"""The paper's. ALTER's own, ten times that, breaks a model in which every token is acted on."""
_NEVER_HIGH = 1.99
"""An entropy threshold that no token exceeds, so that an expert acts on every token at weight 1."""


class _WithRetain(ExpertTraining):
    """An expert without a gate, beside a term that keeps the retained rows; A learns too if it may."""

    retain: list[EncodedRow]
    learned_a: tuple[torch.Tensor, ...] = ()

    def term(self, step: int) -> LossTerm:
        term = super().term(step)
        indices = at_step(self.retain, self.settings.batch_rows, step, self.seed)
        batch = make_batch(self.retain, indices, self.base.pad_id)
        kept = answer_nll(self.base.logits(batch), batch.labels).mean()
        parameters = (*self.lora_b.values(), *self.learned_a)
        return LossTerm(name="forget and retain", value=term.value + kept, parameters=parameters)


class Timing:
    """The methods on one domain."""

    def __init__(self, bench: Bench, epochs: int, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.base = load_base_model(bench.base_folder)
        self.rows = encoded_files(self.base, next(iter(bench.files.values())))
        self.retain = encoded_files(self.base, bench.retain)
        self.general = encoded_files(self.base, *bench.general)
        self.settings = ExpertSettings(epochs=epochs, min_steps=0)
        self.num_steps = self.settings.num_steps(len(self.rows))

    def gradient_ascent(self) -> Figures:
        """All weights, float32 under bfloat16 autocast."""
        model = AutoModelForCausalLM.from_pretrained(self.bench.base_folder, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_ASCENT_RATE, fused=True)

        def step(number: int) -> None:
            indices = at_step(self.rows, self.settings.batch_rows, number, self.seed)
            batch = make_batch(self.rows, indices, self.base.pad_id)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
            (-answer_nll(logits, batch.labels).mean()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        started = time.process_time()
        return self._measured(started, step, dataclasses.replace(self.base, model=model))

    def alter(self, forget_loss: str = "counterfactual", tap_layer: int | None = None) -> Figures:
        """Router and expert, as `alter train` makes them on a given substrate."""
        substrate = self._substrate(tap_layer=tap_layer)
        started = time.process_time()
        head, _ = train_evidence(
            normalised_embeddings(self.base, substrate),
            self.rows,
            [row.ids for row in (*self.retain, *self.general)],
            self.base.tokenizer,
            substrate.config,
            EvidenceSettings(),
            seed=self.seed,
        )
        routed = time.process_time()
        training = self._expert(ExpertTraining, substrate, head, forget_loss=forget_loss)
        figures = self._measured(started, training.step, self.base, training.settle)
        training.close()
        return figures | {"router_cpu_seconds": routed - started}

    def lora(self, *, learns_a: bool) -> Figures:
        """The same forget loss without a gate, beside a retain term."""
        substrate = self._substrate(entropy_threshold=_NEVER_HIGH)
        started = time.process_time()
        training = self._expert(
            _WithRetain,
            substrate,
            self._always(substrate.config),
            learning_rate=_UNGATED_RATE,
        )
        assert isinstance(training, _WithRetain)
        training.retain = self.retain
        if learns_a:
            training.learned_a = tuple(a.requires_grad_(True) for a in substrate.lora_a.values())
            training.optimizer.add_param_group({"params": list(training.learned_a)})
        figures = self._measured(started, training.step, self.base, training.settle)
        training.close()
        return figures

    def _substrate(self, tap_layer: int | None = None, **changes: float) -> Substrate:
        layer = default_tap_layer(self.base.info.num_layers) if tap_layer is None else tap_layer
        return initial_substrate(self.base, AlterConfig(tap_layer=layer, **changes), self.seed)

    def _always(self, config: AlterConfig) -> EvidenceHead:
        """A head that finds evidence in every token."""
        head = EvidenceHead(
            self.base.info.hidden_size, ngram=config.evidence_ngram, num_units=config.evidence_units
        ).requires_grad_(False)
        head.fc2.weight.zero_()
        head.fc2.bias.fill_(1.0)
        return head

    def _expert(
        self,
        kind: type[ExpertTraining],
        substrate: Substrate,
        head: EvidenceHead,
        **changes: Any,
    ) -> ExpertTraining:
        config, name = substrate.config, self.bench.split.name
        with tempfile.TemporaryDirectory() as folder:
            entropy = cached_entropy(
                self.base,
                self.rows,
                tsallis_q=config.tsallis_q,
                tap_layer=config.tap_layer,
                folder=Path(folder),
            )
        settings = dataclasses.replace(self.settings, target_probability=0.0, **changes)
        selected = select_answer_tokens(self.rows, entropy, config.entropy_threshold, settings)
        texts = [row.ids for row in (*self.retain, *self.general)]
        words = Counterfactuals(
            self.base.tokenizer,
            texts,
            [row.ids for row in self.rows],
            kept_share=settings.kept_share,
        )
        return kind(
            self.base,
            substrate,
            f"forget{name}",
            head,
            self.rows,
            selected,
            words,
            settings,
            seed=self.seed,
        )

    def _measured(
        self,
        started: float,
        step: Callable[[int], object],
        base: BaseModel,
        finish: Callable[[], object] = lambda: None,
    ) -> Figures:
        """Runs all steps and measures what came of them; FLOPs are counted over a few more."""
        for number in range(self.num_steps):
            step(number)
        finish()
        seconds = time.process_time() - started
        logs = self.bench.measure(TransformersModel(base))
        quality = tofu.figures(logs, self.bench.retrained_logs)
        with FlopCounterMode(display=False) as counter:
            for number in range(_FLOP_STEPS):
                step(number)
        flops = counter.get_total_flops() / _FLOP_STEPS * self.num_steps
        cost = {"cpu_seconds": seconds, "teraflops": flops / 1e12}
        return cost | {name: quality[name] for name in _QUALITY}


def main() -> None:
    """Times every method and writes `tofu-timing`."""
    parser = table_parser(__doc__, (HALF, *SPLITS), HALF)
    parser.set_defaults(threads=1)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser)
    data = default_data_dir()
    timing = Timing(Bench(load_split(data, options.split), data), options.epochs, options.seed)
    last = timing.base.info.num_layers - 1
    methods: dict[str, Callable[[], Figures]] = {
        "full fine-tuning, gradient ascent": timing.gradient_ascent,
        "AsymLoRA": lambda: timing.lora(learns_a=False),
        "LoRA": lambda: timing.lora(learns_a=True),
        "ALTER": timing.alter,
        "ALTER, IHL": lambda: timing.alter(forget_loss="ihl"),
        "ALTER, IHL, last layer alone": lambda: timing.alter("ihl", last),
    }
    rows: dict[str, list[Figures]] = {}
    for name, method in methods.items():
        rows[name] = [method()]
        print(name, rows[name][0], flush=True)
    for figures in rows.values():
        for key, other in (
            ("over_gradient_ascent", "full fine-tuning, gradient ascent"),
            ("over_asymlora", "AsymLoRA"),
        ):
            figures[0][key] = figures[0]["cpu_seconds"] / rows[other][0]["cpu_seconds"]
    path = write_table(
        options.out,
        "tofu-timing",
        rows,
        title="TOFU: time efficiency",
        notes={
            "rows": f"{len(timing.rows)} forgotten, {options.epochs} epochs of batches of "
            f"{timing.settings.batch_rows}",
            "threads": options.threads,
        },
        seed=options.seed,
    )
    print(path)


if __name__ == "__main__":
    main()
