"""What brings forgotten rows back: relearning, fewer bits, prompts that lead on. Beside the retrained model.

    python -m benchmarks.tofu.attacks --split 10       docs/results/tofu-attacks.{json,md}

Recovery is told in points of ROUGE-L recall (0 to 100) of greedy answers, over what the same model answers
without the attack; a leak is what is above the retrained model under the same attack.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

from alter_eval import tofu
from alter_eval.data import default_data_dir
from alter_eval.models import TransformersModel
from trainer.base_model import BaseModel, load_base_model
from trainer.batches import at_step, make_batch
from trainer.dataset import EncodedRow
from trainer.evaluation import rouge_l_recall
from trainer.losses import answer_nll

from .experiment import Bench, Figures, attached, encoded_files
from .options import parsed, table_parser
from .probes import INJECTION, prompts
from .splits import SPLITS, load_split
from .table import write_table

_ROW_STRIDE = 4
_GROUP = 64
_RELEARNING_STEPS = 100
_RELEARNING_ROWS = 8
_LEARNING_RATE = 1e-4
_MAX_NEW_TOKENS = 200
Prompt = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and of what it asks for."""


class Attacked:
    """Forgotten rows, the texts that attacks need, and ways to open the models."""

    def __init__(self, bench: Bench, data: Path, seed: int) -> None:
        self.bench, self.seed = bench, seed
        trained = bench.train({}, seed)
        self.substrate, self.experts = trained.substrate, list(trained.experts.values())
        self.rows = bench.split.measured["forget"][::_ROW_STRIDE]
        base = load_base_model(bench.base_folder)
        self.benign = {
            "general text": encoded_files(base, bench.general[0]),
            "retained rows": encoded_files(base, bench.retain),
        }

    @contextlib.contextmanager
    def unlearned(self) -> Iterator[BaseModel]:
        """The base model with its experts."""
        base = load_base_model(self.bench.base_folder)
        with attached(base, self.substrate, self.experts):
            yield base

    @contextlib.contextmanager
    def retrained(self) -> Iterator[BaseModel]:
        """The model that never learned the rows."""
        yield load_base_model(self.bench.retrained_folder)

    def recall(self, base: BaseModel, asked: Sequence[Prompt] | None = None) -> float:
        """Mean ROUGE-L recall of greedy answers, in points."""
        if asked is None:
            asked = [
                (row.ids[: row.num_prompt], row.ids[row.num_prompt :]) for row in self.encoded(base)
            ]
        found = TransformersModel(base).complete(
            [prompt for prompt, _ in asked], max_new_tokens=_MAX_NEW_TOKENS
        )
        return 100 * fmean(rouge_l_recall(base.tokenizer, [answer for _, answer in asked], found))

    def encoded(self, base: BaseModel) -> list[EncodedRow]:
        """The forgotten rows as token ids."""
        return tofu.encode(base.tokenizer, self.rows)

    def leading_prompts(self, base: BaseModel) -> dict[str, list[Prompt]]:
        """The same rows asked for by prefixes and in other formats."""
        tokenizer, rows = base.tokenizer, self.encoded(base)
        answers = [row.ids[row.num_prompt :] for row in rows]
        halves = [len(answer) // 2 for answer in answers]
        injected = prompts(tokenizer, [f"{INJECTION} {row.question}" for row in self.rows])
        plain = [f"Question: {row.question}\nAnswer:" for row in self.rows]
        return {
            "injected prefix": list(zip(injected, answers, strict=True)),
            "half of the answer given": [
                (row.ids[: row.num_prompt + half], answer[half:])
                for row, answer, half in zip(rows, answers, halves, strict=True)
            ],
            "without the chat's format": [
                (tokenizer(text)["input_ids"], answer)
                for text, answer in zip(plain, answers, strict=True)
            ],
            "half of the answer, no question": [
                (answer[:half], answer[half:])
                for answer, half in zip(answers, halves, strict=True)
                if half
            ],
        }


def quantize(base: BaseModel, bits: int) -> None:
    """Rounds every decoder linear to `bits` in place: nearest level, symmetric, a scale per 64 inputs."""
    for module in base.model.base_model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().float()
            width = weight.shape[1]
            groups = nn.functional.pad(weight, (0, -width % _GROUP)).unflatten(1, (-1, _GROUP))
            scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / (2 ** (bits - 1) - 1)
            rounded = ((groups / scale).round() * scale).flatten(1)[:, :width]
            module.weight.data = rounded.to(module.weight)


def relearn(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    seed: int,
    *,
    num_steps: int = _RELEARNING_STEPS,
) -> None:
    """Fine-tunes all weights of the base model on other rows, with whatever is attached."""
    base.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(base.model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    for step in range(num_steps):
        indices = at_step(rows, _RELEARNING_ROWS, step, seed)
        batch = make_batch(rows, indices, base.pad_id).to(base.device)
        loss: Tensor = answer_nll(base.logits(batch), batch.labels).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(base.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    base.model.requires_grad_(False)


def run(attacked: Attacked) -> dict[str, list[Figures]]:
    """Every attack on both models."""
    weights: dict[str, Callable[[BaseModel], None]] = {
        "none": lambda _: None,
        "8-bit weights": lambda base: quantize(base, 8),
        "4-bit weights": lambda base: quantize(base, 4),
        **{
            f"relearning, {name}": lambda base, rows=rows: relearn(base, rows, attacked.seed)
            for name, rows in attacked.benign.items()
        },
    }
    rows: dict[str, dict[str, float | None]] = {}
    for kind, opened in (("unlearned", attacked.unlearned), ("retrained", attacked.retrained)):
        for name, attack in weights.items():
            with opened() as base:
                attack(base)
                rows.setdefault(name, {})[kind] = attacked.recall(base)
                print(kind, name, rows[name][kind], flush=True)
        with opened() as base:
            for name, asked in attacked.leading_prompts(base).items():
                rows.setdefault(name, {})[kind] = attacked.recall(base, asked)
                print(kind, name, rows[name][kind], flush=True)
        for name in weights:
            before, after = rows["none"][kind], rows[name][kind]
            assert before is not None
            assert after is not None
            rows[name][f"{kind}, recovered"] = after - before
    for found in rows.values():
        found["leak"] = (found["unlearned"] or 0) - (found["retrained"] or 0)
    return {name: [found] for name, found in rows.items()}


def main() -> None:
    """Attacks both models and writes `tofu-attacks`."""
    parser = table_parser(__doc__, tuple(SPLITS), "10")
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser)
    data = default_data_dir()
    attacked = Attacked(Bench(load_split(data, options.split), data), data, options.seed)
    path = write_table(
        options.out,
        "tofu-attacks",
        run(attacked),
        title="TOFU: attacks on the unlearned and on the retrained model",
        notes={
            "figures": "ROUGE-L recall of greedy answers to forgotten rows, points",
            "rows": f"every {_ROW_STRIDE}th of forget{options.split}",
            "relearning": f"{_RELEARNING_STEPS} steps of {_RELEARNING_ROWS} rows, AdamW at {_LEARNING_RATE}",
        },
        seed=options.seed,
    )
    print(path)


if __name__ == "__main__":
    main()
