"""What serving costs under the ways of unlearning that vLLM can serve, side by side in one process.

- `base`: vLLM alone. Methods that train every weight, and merged adapters, are just another checkpoint.
- `lora`: vLLM's own runtime LoRA, rank 8. On a CPU vLLM does not compile an engine that takes adapters, so
  this figure has both costs in it: what an operator of such a machine would see.
- `alter`: our engine on a CPU, with the experts active.
- `eco`: embedding-corrupted prompts. vLLM takes prompts as embeddings, on a CPU too, and beside prompts of
  token ids in one batch: `alter_eval.eco`'s classifier judges each prompt, a flagged one is sent as its
  corrupted embeddings, any other as token ids; judging and corrupting are part of the measured time. The
  classifier is a regression on n-grams: what the second model of ECO's paper costs is not in these figures.

All engines are up at once and take turns at the same prompts. Every figure is a median over rounds, the first
of which is thrown away; every ratio is taken within its round. `NAME_decode_tokens_per_s` and
`NAME_decode_ratio` (above 1 is faster than base) are of 16 prompts at once, prefill included;
`NAME_latency_ms` and `NAME_latency_ratio` (above 1 is slower) of one alone. With `_retain` or `_forget` they
are of that traffic; without, of both, evenly. `eco_flagged_KIND` is the share of prompts that ECO corrupts,
`alter_routed_KIND` the share of tokens that forget experts compute: ratios say little of engines that do
nothing.

`python -m benchmarks.methods.serving JOB.json RESULT.json` reads a `Job` and writes a `Measured`. vLLM's
processes end with it.

Legend: T tokens, D embedding size, K corrupted dimensions, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from pydantic import BaseModel as Schema
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.inputs import EmbedsPrompt
from vllm.lora.request import LoRARequest

from alter_core import ForgetExpert, Substrate
from alter_eval.eco import Prompt, PromptClassifier, prompt_noise
from trainer.base_model import BaseModel, load_base_model
from trainer.checkpoint import write_atomically
from trainer.methods.adapter import LoraAdapter

BASE = "base"
NUM_NEW_TOKENS = 32
BATCH_SIZE = 16
NUM_BATCHES = 4
"""Batches of 16 that each engine answers per round and kind of traffic."""
NUM_REQUESTS = 8
"""The same of requests alone."""
_LORA_RANK = 8
_MAX_DOMAINS = 64
_NUM_PROBED = 64
"""Prompts of a kind that routed tokens are counted over, at most."""

Answer = Callable[[Sequence[Prompt]], object]
"""Answers these prompts, all at once."""
Seconds = Mapping[str, Mapping[str, float]]
"""By engine, by kind of traffic."""


class Job(Schema):
    """What to measure. Paths, prompts as token ids, and settings of `measure_serving`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    substrate: Path
    experts: list[Path] = Field(min_length=1)
    retain: list[list[int]] = Field(min_length=1)
    forget: list[list[int]] = Field(min_length=1)
    eco_strength: float = Field(ge=0)
    rounds: int = Field(ge=1)
    seed: int = 0


class Measured(Schema):
    """What was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    figures: dict[str, float]
    """Medians over rounds."""
    spread: dict[str, tuple[float, float]]
    """Lowest and highest round of each figure that rounds have."""
    start_s: float
    """To start all engines."""
    rounds_s: float
    """All rounds, the one that is thrown away among them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads a job, measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("job", type=Path, help="a Job as JSON")
    parser.add_argument("result", type=Path, help="where to write a Measured as JSON")
    options = parser.parse_args(arguments)
    job = Job.model_validate_json(options.job.read_bytes())
    measured = measure_serving(**dict(job))
    write_atomically(options.result, measured.model_dump_json(indent=1).encode() + b"\n")


def measure_serving(
    model: Path,
    substrate: Path,
    experts: Sequence[Path],
    retain: Sequence[Prompt],
    forget: Sequence[Prompt],
    *,
    eco_strength: float,
    rounds: int,
    seed: int,
) -> Measured:
    """Starts all four engines and measures `rounds` rounds, after one that does not count.

    ECO's classifier is fitted on these very prompts. Engines end with the process.
    Raises: ConfigError if there are too few prompts for it; BundleError.
    """
    traffic = {"retain": retain, "forget": forget}
    base = load_base_model(model, device="cpu")
    shared = Substrate.read(substrate, base.info)
    digests = {folder: ForgetExpert.read(folder, shared).digest for folder in experts}
    classifier = PromptClassifier(forget, retain)
    eco = EcoInputs(
        classifier=classifier,
        embeddings=embedding_matrix(base),
        strength=eco_strength,
        seed=seed,
    )
    figures = {f"eco_flagged_{kind}": float(classifier(p).mean()) for kind, p in traffic.items()}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(base, Path(folder), seed=seed)
        engines = {
            BASE: _Engine(_llm(model)),
            "lora": _lora_engine(model, adapter),
            "alter": _alter_engine(model, substrate, digests),
            "eco": _Engine(_llm(model, enable_prompt_embeds=True), inputs=eco),
        }
        start_s = time.perf_counter() - started
        figures |= {
            f"alter_routed_{kind}": _routed_share(engines["alter"], prompts[:_NUM_PROBED])
            for kind, prompts in traffic.items()
        }
        started = time.perf_counter()
        with _one_thread():
            measured = measure_rounds(engines, traffic, rounds=rounds, seed=seed)
    medians, spread = summary(measured)
    return Measured(
        figures=figures | medians,
        spread=spread,
        start_s=start_s,
        rounds_s=time.perf_counter() - started,
    )


def measure_rounds(
    engines: Mapping[str, Answer],
    traffic: Mapping[str, Sequence[Prompt]],
    *,
    rounds: int,
    seed: int,
) -> list[dict[str, float]]:
    """Figures of each round, without the first, in which engines warm up."""
    drawn = {
        kind: itertools.cycle(random.Random(seed).sample(list(prompts), len(prompts)))
        for kind, prompts in traffic.items()
    }
    found = []
    for _ in range(rounds + 1):
        batch_s: dict[str, dict[str, float]] = {name: {} for name in engines}
        request_s: dict[str, dict[str, float]] = {name: {} for name in engines}
        for kind, prompts in drawn.items():
            for seconds, size, number in (
                (batch_s, BATCH_SIZE, NUM_BATCHES),
                (request_s, 1, NUM_REQUESTS),
            ):
                for name, median_s in _take_turns(engines, _batches(prompts, size, number)).items():
                    seconds[name][kind] = median_s
        found.append(round_figures(batch_s, request_s))
    return found[1:]


def round_figures(batch_s: Seconds, request_s: Seconds) -> dict[str, float]:
    """Figures of one round, from the seconds that a batch and a request took."""
    figures: dict[str, float] = {}
    num_tokens = BATCH_SIZE * NUM_NEW_TOKENS
    for name in batch_s:
        by_kind = {
            "decode_tokens_per_s": {k: num_tokens / s for k, s in batch_s[name].items()},
            "latency_ms": {k: 1000 * s for k, s in request_s[name].items()},
        }
        if name != BASE:
            by_kind["decode_ratio"] = {k: batch_s[BASE][k] / s for k, s in batch_s[name].items()}
            by_kind["latency_ratio"] = {
                k: s / request_s[BASE][k] for k, s in request_s[name].items()
            }
        for figure, values in by_kind.items():
            figures[f"{name}_{figure}"] = fmean(values.values())
            figures |= {f"{name}_{figure}_{kind}": value for kind, value in values.items()}
    return figures


def summary(
    rounds: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Median of each figure over rounds; its lowest and highest."""
    values = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    return (
        {name: median(found) for name, found in values.items()},
        {name: (min(found), max(found)) for name, found in values.items()},
    )


def _batches(prompts: Iterator[Prompt], size: int, number: int) -> list[list[Prompt]]:
    return [list(itertools.islice(prompts, size)) for _ in range(number)]


def _take_turns(
    engines: Mapping[str, Answer], batches: Sequence[Sequence[Prompt]]
) -> dict[str, float]:
    """Median seconds of each engine for a batch. Who begins changes from batch to batch."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for turn, batch in enumerate(batches):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            engines[name](batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: median(found) for name, found in seconds.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch in this process, which has small tensors alone, does not wait for a core that an engine is on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EcoInputs:
    """Prompts as ECO sends them. The corruption is `EcoModel`'s, to the bit."""

    classifier: Callable[[Sequence[Prompt]], Any]
    embeddings: Tensor
    """Of the checkpoint. Shape: (V, D)."""
    strength: float
    seed: int

    def __call__(self, prompts: Sequence[Prompt]) -> list[TokensPrompt | EmbedsPrompt]:
        """Flagged prompts as corrupted embeddings, others as token ids."""
        return [
            EmbedsPrompt(prompt_embeds=self.corrupted(prompt)) if flagged else _tokens(prompt)
            for prompt, flagged in zip(prompts, self.classifier(prompts), strict=True)
        ]

    def corrupted(self, prompt: Prompt) -> Tensor:
        """The prompt's embeddings with noise in the first dimension. Shape: (T, D)."""
        embeddings_TD = self.embeddings[torch.tensor(list(prompt))]
        noise_TK = prompt_noise(prompt, strength=self.strength, seed=self.seed)
        embeddings_TD[:, : noise_TK.shape[1]] += noise_TK.to(embeddings_TD)
        return embeddings_TD


def embedding_matrix(base: BaseModel) -> Tensor:
    """The checkpoint's input embeddings, in its dtype. Shape: (V, D)."""
    embedding = base.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.detach()


def write_adapter(base: BaseModel, folder: Path, *, seed: int) -> Path:
    """A LoRA adapter as PEFT writes it, in every linear of the decoder layers, A and B random.

    The model is as before afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = LoraAdapter(rank=_LORA_RANK).attach(base.model)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))
    adapted.unload()
    return folder


class _Engine:
    """A vLLM engine that answers greedily, 32 tokens each."""

    def __init__(
        self,
        llm: LLM,
        *,
        inputs: Callable[[Sequence[Prompt]], list[TokensPrompt | EmbedsPrompt]] | None = None,
        lora: LoRARequest | None = None,
    ) -> None:
        self.llm, self._inputs, self._lora = llm, inputs or _as_tokens, lora
        self._params = SamplingParams(
            temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False
        )

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        outputs = self.llm.generate(
            self._inputs(prompts), self._params, lora_request=self._lora, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def _as_tokens(prompts: Sequence[Prompt]) -> list[TokensPrompt | EmbedsPrompt]:
    return [_tokens(prompt) for prompt in prompts]


def _tokens(prompt: Prompt) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=list(prompt))


def _llm(model: Path, **options: Any) -> LLM:
    return LLM(
        model=str(model),
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        async_scheduling=False,
        **options,
    )


def _lora_engine(model: Path, adapter: Path) -> _Engine:
    llm = _llm(model, enable_lora=True, max_loras=1, max_lora_rank=_LORA_RANK)
    return _Engine(llm, lora=LoRARequest("adapter", 1, str(adapter)))


def _alter_engine(model: Path, substrate: Path, digests: Mapping[Path, str | None]) -> _Engine:
    settings = {"substrate": str(substrate.absolute()), "max_domains": _MAX_DOMAINS}
    llm = _llm(
        model,
        worker_cls="server.engine.worker.AlterCPUWorker",
        additional_config={"alter": settings},
    )
    for slot, (folder, digest) in enumerate(digests.items()):
        llm.collective_rpc("alter_stage", args=(str(folder.absolute()), digest))
        llm.collective_rpc("alter_commit", args=(slot + 1, slot, digest))
    return _Engine(llm)


def _routed_share(engine: _Engine, prompts: Sequence[Prompt]) -> float:
    """Share of tokens that forget experts compute while the engine answers."""

    def num_retained() -> int:
        counts: list[list[int]] = engine.llm.collective_rpc("alter_routed_tokens")[0]
        return sum(counts[0])

    before = num_retained()
    engine(prompts)
    # The last new token is never computed on.
    num_tokens = sum(len(prompt) + NUM_NEW_TOKENS - 1 for prompt in prompts)
    return 1 - (num_retained() - before) / num_tokens


if __name__ == "__main__":
    main()
