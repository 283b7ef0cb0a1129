"""ALTER's forget experts, by which answer tokens they learn from.

Substrate and router are trained once a seed, as `alter train` does; the masks differ in B_f alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from torch import Tensor

import trainer
from alter_cli.demo.artefacts import package_folder, sources
from alter_core import ForgetExpert, Substrate
from alter_eval.models import TransformersModel, WithoutExperts
from benchmarks.tofu.experiment import encoded_files
from trainer.base_model import BaseModel, load_base_model
from trainer.counterfactual import Counterfactuals
from trainer.dataset import EncodedRow
from trainer.entropy_pass import run_entropy_pass
from trainer.evaluation import attached_experts
from trainer.experts import ExpertTraining, select_answer_tokens
from trainer.methods.spans import knowledge_tokens
from trainer.settings import ExpertSettings
from trainer.substrate import on_device, rounded

from .contenders import Alter
from .gradient import perturbed_answers
from .tasks import Task
from .unlearned import Opened, Unlearned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundles:
    """What `alter train` wrote."""

    substrate: Path
    expert: Path
    shared_s: float
    """Seconds for substrate and router."""
    expert_s: float


def run(contender: Alter, task: Task, *, seed: int, cache: Path) -> Unlearned:
    """The task forgotten by an expert."""
    made = bundles(task, seed, cache)
    base = load_base_model(task.base_folder)
    substrate = on_device(Substrate.read(made.substrate, base.info), base.device)
    expert = ForgetExpert.read(made.expert, substrate)
    expert_s = made.expert_s
    if contender.mask != "threshold":
        started = time.monotonic()
        expert = _masked(contender, task, base, substrate, expert, seed)
        expert_s = time.monotonic() - started
    num_parameters = sum(tensor.numel() for tensor in expert.lora_b.values())
    num_parameters += sum(tensor.numel() for tensor in expert.evidence.parameters())
    return Unlearned(
        train_s=made.shared_s + expert_s,
        num_parameters=num_parameters,
        settings={},
        open=functools.partial(_opened, task, substrate, expert),
    )


def bundles(task: Task, seed: int, cache: Path) -> Bundles:
    """Substrate and expert with the defaults of `alter train`; those that this code trained are kept."""
    code = [sources(package_folder(name)) for name in ("trainer", "alter_core")]
    key = json.dumps([task.base_folder.name, seed, code])
    out = cache / f"alter-{task.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    with FileLock(f"{out}.lock"):
        if not (out / "run.json").exists():
            trainer.train(
                trainer.TrainSettings(
                    model=task.base_folder,
                    out=out,
                    forget={task.domain: task.forget},
                    retain=(task.retain,),
                    general=task.general,
                    evaluation_rows=0,
                    seed=seed,
                    resume=out.exists(),
                )
            )
    timings = json.loads((out / "run.json").read_bytes())["timings_s"]
    return Bundles(
        substrate=out / "substrate",
        expert=out / task.domain,
        shared_s=timings["substrate"] + timings[f"{task.domain}/evidence"],
        expert_s=timings[f"{task.domain}/expert"],
    )


@contextlib.contextmanager
def _opened(task: Task, substrate: Substrate, expert: ForgetExpert) -> Iterator[Opened]:
    base = load_base_model(task.base_folder)
    with attached_experts(base, substrate, [expert]) as attached:
        yield Opened(base=base, model=TransformersModel(base), judge=WithoutExperts(base, attached))


def _masked(
    contender: Alter,
    task: Task,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    seed: int,
) -> ForgetExpert:
    """The expert trained anew on other tokens, behind the same router."""
    rows = encoded_files(base, task.forget)
    mask = "none" if contender.mask == "spans" else contender.mask
    settings = ExpertSettings(entropy_mask=mask)
    texts = [row.ids for row in encoded_files(base, task.retain, *task.general)]
    words = Counterfactuals(
        base.tokenizer, texts, [row.ids for row in rows], kept_share=settings.kept_share
    )
    training = ExpertTraining(
        base,
        substrate,
        expert.name,
        expert.evidence,
        rows,
        _selected(contender, task, base, substrate, rows, settings),
        words,
        settings,
        seed=seed,
    )
    try:
        step = 0
        while not training.is_done(step):
            training.step(step)
            step += 1
        training.settle()
    finally:
        training.close()
    return dataclasses.replace(expert, lora_b=rounded(training.lora_b, base.dtype))


def _selected(
    contender: Alter,
    task: Task,
    base: BaseModel,
    substrate: Substrate,
    rows: Sequence[EncodedRow],
    settings: ExpertSettings,
) -> list[Tensor]:
    """Answer tokens to learn from. Shapes: per row (T,) bool."""
    if contender.mask == "spans":
        perturbed, paraphrased = perturbed_answers(task)
        return [
            knowledge_tokens(base.tokenizer, row, wrong, reworded)
            for row, wrong, reworded in zip(rows, perturbed, paraphrased, strict=True)
        ]
    config = substrate.config
    entropy = run_entropy_pass(
        base, rows, tsallis_q=config.tsallis_q, tap_layer=config.tap_layer
    ).entropy
    return select_answer_tokens(rows, entropy, config.entropy_threshold, settings)
