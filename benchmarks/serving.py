"""Decode throughput with active domains over base vLLM, interleaved in one run: `make bench`.

Both engines are up at the same time and take turns; each figure is a median over rounds. The model and the
experts are the demo's. Traffic: `retain` prompts, on which no expert fires, and `forget` prompts, whose
tokens are nearly all computed by an expert.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams, TokensPrompt

from alter_cli.demo import artefacts
from alter_cli.demo.command import default_data_dir
from alter_cli.demo.tokenizer import chat_ids
from alter_core import ForgetExpert, Substrate

from .results import write_results

BATCH_SIZES = (1, 16, 64)


def main() -> None:
    """Measures and writes `serving-first.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--artefacts", type=Path, default=Path("build/demo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens a request")
    options = parser.parse_args()
    made = _artefacts(options.artefacts)
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    forget = [chat_ids(tokenizer, row)[0] for rows in made.corpus.domains.values() for row in rows]
    traffic = {
        "retain": [chat_ids(tokenizer, row)[0] for row in made.corpus.retain],
        "forget": forget,
    }
    base, ours = _engine(made, with_alter=False), _engine(made, with_alter=True)
    ratios: dict[str, list[float]] = {}
    for _ in range(options.rounds + 1):
        for kind, prompts in traffic.items():
            for batch in BATCH_SIZES:
                rates = [_decode_rate(llm, prompts, batch, options.tokens) for llm in (base, ours)]
                ratios.setdefault(f"decode_ratio_b{batch}_{kind}", []).append(rates[1] / rates[0])
    measured = {name: sorted(values[1:]) for name, values in ratios.items()}
    path = write_results(
        options.out,
        "serving-first",
        title="Decode throughput with two active domains over base vLLM",
        figures={name: round(median(values), 3) for name, values in measured.items()},
        spread={name: (round(v[0], 3), round(v[-1], 3)) for name, v in measured.items()},
        seed=0,
        notes={
            "model": "the demo's Llama, about 5 million parameters, bf16, compiled",
            "active domains": len(made.experts),
            "decoded tokens a request": options.tokens,
            "rounds": options.rounds,
        },
    )
    print(path.read_text())


def _artefacts(folder: Path) -> artefacts.Artefacts:
    corpus = artefacts.load_corpus(
        "authors", num_authors=None, num_domains=2, data_dir=default_data_dir(), seed=0
    )
    return artefacts.make(corpus, folder, seed=0, console=Console())


def _engine(made: artefacts.Artefacts, *, with_alter: bool) -> LLM:
    options: dict[str, Any] = {"async_scheduling": False}
    if with_alter:
        settings = {"substrate": str(made.substrate.absolute()), "max_domains": 64}
        options["worker_cls"] = "server.engine.worker.AlterCPUWorker"
        options["additional_config"] = {"alter": settings}
    llm = LLM(
        model=str(made.model),
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        **options,
    )
    if with_alter:
        substrate = Substrate.read(made.substrate)
        for slot, folder in enumerate(made.experts.values()):
            digest = ForgetExpert.read(folder, substrate).digest
            llm.collective_rpc("alter_stage", args=(str(folder.absolute()), digest))
            llm.collective_rpc("alter_commit", args=(slot + 1, slot, digest))
    return llm


def _decode_rate(llm: LLM, prompts: list[list[int]], batch: int, num_tokens: int) -> float:
    """Tokens a second."""
    chosen = [TokensPrompt(prompt_token_ids=prompts[i % len(prompts)]) for i in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate(chosen, params, use_tqdm=False)
    return batch * num_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
