from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alter_cli.demo.base_model import LlamaShape
from alter_core import ForgetExpert, Substrate
from alter_core.attach import AttachedModel
from benchmarks.serving.artefacts import Artefacts
from benchmarks.serving.experts import HIGH_ENTROPY_SHARE
from benchmarks.serving.floor import floor_of, seven_billion
from benchmarks.serving.models import SHAPES, Sizes
from benchmarks.serving.traffic import Traffic, TrafficKind

NUM_DOMAINS = 3
SHAPE = LlamaShape(
    vocab_size=2048,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    max_positions=512,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    return Artefacts(tmp_path_factory.mktemp("serving"), SHAPE, seed=0)


@pytest.fixture(scope="module")
def attached(made: Artefacts) -> AttachedModel:
    family = made.family(NUM_DOMAINS)
    substrate = Substrate.read(family.substrate, made.base.info)
    experts = [ForgetExpert.read(bundle, substrate) for bundle in family.experts]
    return AttachedModel(made.base.model, substrate, experts)


@pytest.fixture(scope="module")
def traffic(made: Artefacts) -> Traffic:
    return Traffic(made.prose, made.names, num_domains=NUM_DOMAINS)


@torch.inference_mode()
def _expert_by_token(attached: AttachedModel, prompts: list[list[int]]) -> torch.Tensor:
    """0 for the retain expert, 1 + domain otherwise. Shapes: (B prompts of T tokens) -> (B, T)."""
    attached.model(input_ids=torch.tensor(prompts))
    assert attached.routing is not None
    forget = attached.routing.weights[..., 1:]
    return torch.where(forget.sum(dim=-1) > 0, 1 + forget.argmax(dim=-1), 0)


def test_prose_sets_off_no_expert(made: Artefacts, attached: AttachedModel) -> None:
    with torch.inference_mode():
        logits = attached.evidence_logits(torch.tensor([made.prose[:20_000]]))
    assert logits.shape[-1] == NUM_DOMAINS
    assert logits.max() < 0


def test_retain_prompts_are_computed_by_the_base_weights_alone(
    attached: AttachedModel, traffic: Traffic
) -> None:
    assert not _expert_by_token(attached, traffic.prompts(TrafficKind.RETAIN, [200] * 7)).any()


@pytest.mark.parametrize("length", [24, 200])
def test_forget_prompts_are_on_the_experts_of_all_domains_in_turn_up_to_their_end(
    length: int, attached: AttachedModel, traffic: Traffic
) -> None:
    prompts = traffic.prompts(TrafficKind.FORGET, [length] * 7)
    experts = _expert_by_token(attached, prompts)
    assert experts[:, -1].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert all(len(ids) == length for ids in prompts)
    first = (experts > 0).int().argmax(dim=1)
    assert first.max() < 13
    assert all((row[start:] > 0).all() for row, start in zip(experts, first, strict=True))


def test_every_tenth_prompt_of_mixed_traffic_calls_for_an_expert(
    attached: AttachedModel, traffic: Traffic
) -> None:
    experts = _expert_by_token(attached, traffic.prompts(TrafficKind.MIXED, [32] * 30))
    assert experts.any(dim=1).nonzero().flatten().tolist() == [0, 10, 20]
    assert experts[::10, -1].tolist() == [1, 2, 3]


def test_all_names_of_a_domain_set_off_its_expert_alone(
    made: Artefacts, attached: AttachedModel
) -> None:
    for domain in range(NUM_DOMAINS):
        for name in made.names[domain]:
            with torch.inference_mode():
                logits = attached.evidence_logits(torch.tensor([name]))[0, -1]
            assert (logits > 0).nonzero().flatten().tolist() == [domain]


def test_names_of_different_domains_end_in_different_tokens(made: Artefacts) -> None:
    endings = {tuple(name[-5:]) for names in made.names for name in names}
    assert len(endings) == 256 * 64


def test_both_paths_of_the_entropy_gate_are_taken(made: Artefacts, attached: AttachedModel) -> None:
    _expert_by_token(attached, [made.prose[300:700]])
    assert attached.routing is not None
    share = attached.routing.is_high.float().mean().item()
    assert share == pytest.approx(HIGH_ENTROPY_SHARE, abs=0.12)


def test_an_active_expert_changes_the_logits(
    made: Artefacts, attached: AttachedModel, traffic: Traffic
) -> None:
    ids = torch.tensor(traffic.prompts(TrafficKind.FORGET, [48]))
    with torch.inference_mode():
        ours = made.base.model(input_ids=ids).logits
        with attached.disabled():
            base = made.base.model(input_ids=ids).logits
    assert (ours - base)[0, -1].abs().max() > 0.01


def test_what_is_there_is_kept_and_more_experts_are_added(made: Artefacts) -> None:
    before = made.family(NUM_DOMAINS)
    stamps = [(bundle / "manifest.json").stat().st_mtime_ns for bundle in before.experts]
    after = Artefacts(made.folder, SHAPE, seed=0).family(NUM_DOMAINS + 1)
    assert after.experts[:NUM_DOMAINS] == before.experts
    assert stamps == [(b / "manifest.json").stat().st_mtime_ns for b in before.experts]
    substrate = Substrate.read(after.substrate)
    assert ForgetExpert.read(after.experts[-1], substrate).name == "domain-003"


def test_same_seed_same_weights_and_names(made: Artefacts, tmp_path: Path) -> None:
    again = Artefacts(tmp_path / "again", SHAPE, seed=0)
    assert again.base.info.fingerprint == made.base.info.fingerprint
    assert again.names == made.names


def test_heavy_bundle_weighs_what_that_of_a_7b_weighs(tmp_path: Path) -> None:
    bundle = Artefacts(tmp_path, SHAPE, seed=0).heavy_family(1).experts[0]
    heavy = floor_of(seven_billion())
    wanted = heavy.b_bytes + heavy.head_bytes
    weighs = (bundle / "weights.safetensors").stat().st_size
    assert wanted <= weighs <= 1.02 * wanted


def test_adapter_is_random_and_of_the_adapted_layers_only(made: Artefacts) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, made.adapter())
    lora_b = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(lora_b) == 7 * 2
    assert all(tensor.abs().max() > 0 for tensor in lora_b.values())
    assert not any(".layers.0." in name for name in lora_b)


@pytest.mark.parametrize(("name", "millions"), [("25m", 26.1), ("150m", 152.1)])
def test_models_have_the_sizes_of_their_names(name: str, millions: float) -> None:
    from alter_cli.demo.base_model import llama_config

    shape = SHAPES[name]
    assert Sizes.of(shape).num_parameters / 1e6 == pytest.approx(millions, abs=0.1)

    class Tokenizer:
        eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return shape.vocab_size

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(Tokenizer(), shape))  # type: ignore[arg-type]
    assert model.num_parameters() == Sizes.of(shape).num_parameters
