"""The engine against the transformers reference with the same bundles: `make bench-parity`.

Rows are teacher-forced through both. Reported: on how many tokens the route is the same; how far the log
probabilities of each are from the same computation in float32, experts active and not, which tells bf16 noise
from a fault of either; and how often the one-pass entropy estimator and the exact two-pass entropy choose the
same path.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams, TokensPrompt

from alter_cli.demo import artefacts
from alter_cli.demo.command import Dataset
from alter_cli.demo.tokenizer import chat_ids
from alter_core import ForgetExpert, Substrate
from alter_core.attach import AttachedModel
from alter_eval.data import default_data_dir

from .results import write_results

_Tokens = list[int]


def main() -> None:
    """Measures and writes `parity.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--artefacts", type=Path, default=Path("build/demo-tofu"))
    parser.add_argument("--dataset", type=Dataset, default=Dataset.TOFU)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    corpus = artefacts.load_corpus(
        options.dataset.value, num_authors=None, num_domains=2, data_dir=default_data_dir(), seed=0
    )
    made = artefacts.make(corpus, options.artefacts, seed=0, console=Console())
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    forget = [row for rows in corpus.domains.values() for row in rows]
    rows = (forget + corpus.retain)[: options.rows]
    chats = [prompt + answer for prompt, answer in (chat_ids(tokenizer, row) for row in rows)]
    substrate = Substrate.read(made.substrate)
    experts = [ForgetExpert.read(folder, substrate) for folder in made.experts.values()]
    engine = _Engine(made)
    figures = _bf16_errors("base", engine.logprobs(chats), made.model, substrate, [], chats)
    engine.activate(experts, list(made.experts.values()))
    figures |= _bf16_errors("active", engine.logprobs(chats), made.model, substrate, experts, chats)
    figures |= {
        "same_route": _same_route(engine.routes(chats), made.model, substrate, experts, chats),
        "estimator_agrees_with_two_pass": _path_agreement(made.model, substrate, experts, chats),
    }
    path = write_results(
        options.out,
        "parity",
        title="vLLM against the transformers reference",
        figures={name: round(value, 5) for name, value in figures.items()},
        seed=0,
        notes={
            "rows": f"{len(rows)} of {options.dataset.value}, {len(forget)} of them of forget domains",
            "tokens": sum(map(len, chats)),
        },
    )
    print(path.read_text())


class _Engine:
    """vLLM with ALTER, eager, teacher-forced."""

    def __init__(self, made: artefacts.Artefacts) -> None:
        settings = {"substrate": str(made.substrate.absolute()), "max_domains": 4}
        self.llm = LLM(
            model=str(made.model),
            max_model_len=1024,
            enforce_eager=True,
            async_scheduling=False,
            enable_prefix_caching=False,
            worker_cls="server.engine.worker.AlterCPUWorker",
            additional_config={"alter": settings},
        )

    def activate(self, experts: list[ForgetExpert], folders: list[Path]) -> None:
        for slot, (expert, folder) in enumerate(zip(experts, folders, strict=True)):
            self.llm.collective_rpc("alter_stage", args=(str(folder.absolute()), expert.digest))
            self.llm.collective_rpc("alter_commit", args=(slot + 1, slot, expert.digest))

    def logprobs(self, chats: list[_Tokens]) -> list[torch.Tensor]:
        outputs = self._run(chats, prompt_logprobs=0)
        return [
            torch.tensor(
                [e[t].logprob for t, e in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
            )
            for ids, out in zip(chats, outputs, strict=True)
        ]

    def routes(self, chats: list[_Tokens]) -> list[dict[int, int]]:
        """Expert by position, for every chat; requests run one by one, so that records are told apart."""
        routes = []
        for chat in chats:
            self.llm.collective_rpc("alter_record_routes", args=(True,))
            self._run([chat])
            rows = self.llm.collective_rpc("alter_record_routes", args=(False,))[0]
            routes.append({position: expert for _, position, expert, _, _ in rows})
        return routes

    def _run(self, chats: list[_Tokens], **options: Any) -> list[Any]:
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, **options)
        prompts = [TokensPrompt(prompt_token_ids=chat) for chat in chats]
        return list(self.llm.generate(prompts, params, use_tqdm=False))


def _attached(
    model: Path,
    substrate: Substrate,
    experts: list[ForgetExpert],
    dtype: torch.dtype = torch.bfloat16,
) -> AttachedModel:
    # Rounded to bf16 first, so that float32 computes with the very weights that bf16 has.
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    return AttachedModel(loaded.to(dtype), substrate, experts)


def _bf16_errors(
    name: str,
    engine: list[torch.Tensor],
    model: Path,
    substrate: Substrate,
    experts: list[ForgetExpert],
    chats: list[_Tokens],
) -> dict[str, float]:
    """Distance in nats of both bf16 computations from float32, on tokens that no route tells apart."""
    exact, exact_routes = _reference(model, substrate, experts, chats, torch.float32)
    reference, routes = _reference(model, substrate, experts, chats, torch.bfloat16)
    same = torch.cat(exact_routes) == torch.cat(routes)
    figures = {}
    for who, found in (("engine", engine), ("reference", reference)):
        error = (torch.cat(found) - torch.cat(exact)).abs()[same]
        figures[f"{name}_{who}_error_mean"] = float(error.mean())
        figures[f"{name}_{who}_error_p99"] = float(error.quantile(0.99))
    return figures


@torch.inference_mode()
def _reference(
    model: Path,
    substrate: Substrate,
    experts: list[ForgetExpert],
    chats: list[_Tokens],
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(log p of every token after the first, expert that each was predicted under) of every chat."""
    attached = _attached(model, substrate, experts, dtype)
    logprobs, routes = [], []
    for chat in chats:
        ids = torch.tensor([chat])
        logits = attached.model(input_ids=ids).logits[0, :-1].float()
        logprobs.append(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1))
        routes.append(_experts_applied(attached)[:-1])
    return logprobs, routes


def _experts_applied(attached: AttachedModel) -> torch.Tensor:
    """Expert of every token of the last forward, -1 for none. Shape: (T,)."""
    assert attached.routing is not None
    weights = attached.routing.weights[0].clone()
    if not attached.substrate.retain_lora_b:
        weights[:, 0] = 0
    best = weights.max(dim=1)
    return torch.where(best.values > 0, best.indices, -1)


@torch.inference_mode()
def _same_route(
    routes: list[dict[int, int]],
    model: Path,
    substrate: Substrate,
    experts: list[ForgetExpert],
    chats: list[_Tokens],
) -> float:
    attached = _attached(model, substrate, experts)
    same = total = 0
    for chat, found in zip(chats, routes, strict=True):
        attached.model(input_ids=torch.tensor([chat]))
        expected = _experts_applied(attached).tolist()
        same += sum(found[position] == expert for position, expert in enumerate(expected))
        total += len(chat)
    return same / total


@torch.inference_mode()
def _path_agreement(
    model: Path, substrate: Substrate, experts: list[ForgetExpert], chats: list[_Tokens]
) -> float:
    """Share of tokens on which the estimator's path is that of the base model's exact entropy."""
    exact_config = dataclasses.replace(substrate.config, entropy_source="two_pass")
    paths = []
    for config in (substrate.config, exact_config):
        attached = _attached(model, dataclasses.replace(substrate, config=config), experts)
        found = []
        for chat in chats:
            attached.model(input_ids=torch.tensor([chat]))
            assert attached.routing is not None
            found.append(attached.routing.is_high[0])
        paths.append(torch.cat(found))
    return float((paths[0] == paths[1]).float().mean())


if __name__ == "__main__":
    main()
