"""Eq. 9 on every supported architecture, held against models whose weights were merged by hand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter_core import AlterConfig, ForgetExpert, Substrate, tsallis_entropy
from alter_core.attach import AttachedModel, Routing
from alter_core.config import SITE_KINDS
from alter_core.errors import ConfigError
from tests.alter_core.conftest import TinyBase
from tests.alter_core.crafted import (
    HIGH,
    LOW,
    attached,
    blank_expert,
    constant_expert,
    is_latched,
    num_hooks,
    random_lora_b,
    trigger_expert,
    with_entropy,
)
from tests.support.tiny import ARCHITECTURES, VOCAB_SIZE, random_expert, random_substrate

PAD, FIRST_ID = 3, 4
"""Not the model's padding token: its embedding is 0, and a head cannot tell it from no token."""
SITES = [f"layers.{layer}.{kind}" for layer in (1, 2) for kind in SITE_KINDS]
WINDOW = 4

_PROJECTIONS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    "o": ("self_attn", ("o_proj",), None),
    "gate_up": ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
    "down": ("mlp", ("down_proj",), None),
}


@pytest.fixture(scope="module")
def substrates(bases: dict[str, TinyBase]) -> dict[str, Substrate]:
    """A random substrate of every architecture."""
    config = AlterConfig(
        tap_layer=1, rank=5, evidence_window=WINDOW, evidence_ngram=2, evidence_units=7, top_k=2
    )
    return {name: random_substrate(base.folder, config) for name, base in bases.items()}


@pytest.fixture(params=ARCHITECTURES)
def pair(
    request: pytest.FixtureRequest, bases: dict[str, TinyBase], substrates: dict[str, Substrate]
) -> tuple[TinyBase, Substrate]:
    """Model and substrate of each architecture in turn."""
    return bases[request.param], substrates[request.param]


@pytest.fixture
def llama_substrate(substrates: dict[str, Substrate]) -> Substrate:
    """For behaviour that does not depend on the architecture."""
    return substrates["llama"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_ids(*shape: int, seed: int = 0, without: tuple[int, ...] = ()) -> Tensor:
    ids = torch.randint(FIRST_ID, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
    for token in without:
        ids[ids == token] = FIRST_ID
    return ids


def logits_of(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False, **kwargs).logits
    return result


def routing_of(attachment: AttachedModel) -> Routing:
    assert attachment.routing is not None
    return attachment.routing


def merged(model: PreTrainedModel, deltas: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy whose dense weights are W0 + delta at the given sites, stacked in checkpoint order."""
    twin = copy.deepcopy(model)
    for site, delta in deltas.items():
        _, layer, kind = site.split(".")
        block_name, parts, fused = _PROJECTIONS[kind]
        block = getattr(twin.model.layers[int(layer)], block_name)
        names = [fused] if fused is not None and hasattr(block, fused) else list(parts)
        weights = [getattr(block, name).weight for name in names]
        for weight, rows in zip(
            weights, delta.split([weight.shape[0] for weight in weights]), strict=True
        ):
            weight.add_(rows)
    return twin


def dense_deltas(substrate: Substrate, lora_b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """scaling * B A by site."""
    scaling = substrate.config.lora_alpha / substrate.config.rank
    return {
        site: scaling * b.float() @ substrate.lora_a[site].float() for site, b in lora_b.items()
    }


def only_at(expert: ForgetExpert, *sites: str) -> ForgetExpert:
    """The expert with B zero everywhere else."""
    lora_b = {s: b if s in sites else torch.zeros_like(b) for s, b in expert.lora_b.items()}
    return dataclasses.replace(expert, lora_b=lora_b)


# One site at a time: the adapter contract.


@pytest.mark.parametrize("site", SITES)
def test_b_at_one_site_alone_equals_the_merged_weight(
    pair: tuple[TinyBase, Substrate], site: str
) -> None:
    base, substrate = pair
    substrate = with_entropy(substrate, LOW)
    expert = only_at(constant_expert(substrate, seed=3), site)
    ids = random_ids(2, 7)
    with attached(base.float32, substrate, [expert]):
        actual = logits_of(base.float32, ids)
    assert not torch.equal(actual, logits_of(base.float32, ids))
    twin = merged(base.float32, dense_deltas(substrate, {site: expert.lora_b[site]}))
    torch.testing.assert_close(actual, logits_of(twin, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("site", SITES)
def test_b_at_one_site_alone_changes_bf16_logits(
    pair: tuple[TinyBase, Substrate], site: str
) -> None:
    base, substrate = pair
    substrate = with_entropy(substrate, LOW)
    expert = only_at(constant_expert(substrate, seed=3), site)
    ids = random_ids(2, 7)
    before = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate, [expert]):
        after = logits_of(base.bf16, ids)
    assert after.dtype is torch.bfloat16
    assert not torch.equal(after, before)


@pytest.mark.parametrize("entropy", [LOW, HIGH])
def test_zero_b_leaves_base_logits_bitwise(
    pair: tuple[TinyBase, Substrate], entropy: float
) -> None:
    base, substrate = pair
    substrate = with_entropy(substrate, entropy)
    ids = random_ids(2, 7)
    before = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate, [only_at(constant_expert(substrate))]) as attachment:
        assert torch.equal(logits_of(base.bf16, ids), before)
        assert (routing_of(attachment).weights[..., 1] > 0).all()


def test_no_domain_leaves_base_logits_bitwise(pair: tuple[TinyBase, Substrate]) -> None:
    base, substrate = pair
    ids = random_ids(2, 7)
    before = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate) as attachment:
        assert torch.equal(logits_of(base.bf16, ids), before)
        assert routing_of(attachment).weights.shape == (2, 7, 1)


# All sites together.


def test_low_entropy_path_equals_one_experts_merged_weights(
    pair: tuple[TinyBase, Substrate],
) -> None:
    base, substrate = pair
    substrate = with_entropy(substrate, LOW)
    experts = [
        constant_expert(substrate, "weak", seed=1, logit=2.0),
        constant_expert(substrate, "strong", seed=2, logit=3.0),
        constant_expert(substrate, "silent", seed=3, logit=-3.0),
    ]
    ids = random_ids(2, 7)
    with attached(base.float32, substrate, experts) as attachment:
        actual = logits_of(base.float32, ids)
        assert (routing_of(attachment).weights == torch.tensor([0.0, 0.0, 1.0, 0.0])).all()
    twin = merged(base.float32, dense_deltas(substrate, experts[1].lora_b))
    torch.testing.assert_close(actual, logits_of(twin, ids), rtol=1e-3, atol=2e-3)


def test_high_entropy_path_equals_the_weighted_sum_of_merged_weights(
    pair: tuple[TinyBase, Substrate],
) -> None:
    """Top 2 of the 3 domains that beat retain; Eq. 7's weights worked out here."""
    base, substrate = pair
    substrate = with_entropy(substrate, HIGH)
    logits = [0.5, 1.0, -1.0, 0.75]
    experts = [
        constant_expert(substrate, f"domain-{n}", seed=n, logit=value)
        for n, value in enumerate(logits)
    ]
    softmax = torch.softmax(torch.tensor([0.0, *logits]) / 0.8, dim=0)
    weights = {1: softmax[2].item(), 3: softmax[4].item()}
    ids = random_ids(2, 7)
    with attached(base.float32, substrate, experts) as attachment:
        actual = logits_of(base.float32, ids)
        expected = torch.tensor([1.0, 0.0, weights[1], 0.0, weights[3]])
        torch.testing.assert_close(routing_of(attachment).weights, expected.expand(2, 7, 5))
    total = {
        site: sum(
            weight * dense_deltas(substrate, experts[n].lora_b)[site]
            for n, weight in weights.items()
        )
        for site in SITES
    }
    twin = merged(base.float32, total)
    torch.testing.assert_close(actual, logits_of(twin, ids), rtol=1e-3, atol=2e-3)


def test_fused_and_separate_projections_take_the_same_bundle_alike(
    bases: dict[str, TinyBase], substrates: dict[str, Substrate]
) -> None:
    """One B for q, k, v: Phi-3 adds it to the fused output, Llama in three parts."""
    deltas = {}
    for name in ("llama", "phi3"):
        substrate = with_entropy(substrates["llama"], LOW)
        expert = constant_expert(substrate, seed=3)
        model = bases[name].float32
        with attached(model, substrate, [expert]) as attachment:
            model(input_ids=random_ids(2, 3), use_cache=False)
            x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
            block = model.model.layers[1].self_attn
            parts = ["qkv_proj"] if name == "phi3" else ["q_proj", "k_proj", "v_proj"]
            hooked = [getattr(block, part)(x) for part in parts]
            with attachment.disabled():
                plain = [getattr(block, part)(x) for part in parts]
            deltas[name] = torch.cat(hooked, dim=-1) - torch.cat(plain, dim=-1)
    torch.testing.assert_close(deltas["llama"], deltas["phi3"], rtol=1e-3, atol=1e-4)
    assert deltas["llama"].abs().amax(dim=(0, 1)).min() > 0


def test_trained_retain_expert_equals_its_merged_weights(
    pair: tuple[TinyBase, Substrate],
) -> None:
    base, substrate = pair
    config = dataclasses.replace(substrate.config, retain_expert="trained")
    retain = random_lora_b(substrate, seed=8)
    ids = random_ids(2, 7)
    twin = merged(base.float32, dense_deltas(substrate, retain))
    for entropy in (LOW, HIGH):
        trained = with_entropy(
            dataclasses.replace(substrate, config=config, retain_lora_b=retain), entropy
        )
        silent = constant_expert(trained, logit=-3.0)
        with attached(base.float32, trained, [silent]):
            actual = logits_of(base.float32, ids)
        torch.testing.assert_close(actual, logits_of(twin, ids), rtol=1e-3, atol=2e-3)


def test_a_forget_expert_replaces_the_trained_retain_expert_or_joins_it(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    """Eq. 9: B_i A x on the low-entropy path, B_r A x + w B_i A x on the high one."""
    substrate = dataclasses.replace(
        llama_substrate,
        config=dataclasses.replace(llama_substrate.config, retain_expert="trained"),
        retain_lora_b=random_lora_b(llama_substrate, seed=8),
    )
    ids = random_ids(2, 7)
    retain = dense_deltas(substrate, substrate.retain_lora_b)
    for entropy, retain_weight in ((LOW, 0.0), (HIGH, 1.0)):
        expert = constant_expert(substrate, seed=3, logit=1.5)
        weight = 1.0 if entropy == LOW else torch.tensor(1.5 / 0.8).sigmoid().item()
        with attached(llama.float32, with_entropy(substrate, entropy), [expert]):
            actual = logits_of(llama.float32, ids)
        forget = dense_deltas(substrate, expert.lora_b)
        twin = merged(
            llama.float32, {s: retain_weight * retain[s] + weight * forget[s] for s in SITES}
        )
        torch.testing.assert_close(actual, logits_of(twin, ids), rtol=1e-3, atol=2e-3)


# Which tokens are touched.


def test_retained_tokens_stay_bitwise_equal_to_the_base(pair: tuple[TinyBase, Substrate]) -> None:
    """Up to the first trigger every token is retained; a row without one is retained whole."""
    base, substrate = pair
    token = 77
    ids = random_ids(3, 9, without=(token,))
    ids[0, 4] = ids[2, 0] = token
    before = logits_of(base.bf16, ids)
    expert = trigger_expert(substrate, base.bf16, "person", token=token)
    for entropy in (LOW, HIGH):
        with attached(base.bf16, with_entropy(substrate, entropy), [expert]):
            after = logits_of(base.bf16, ids)
        is_same = (after == before).all(dim=-1)
        assert is_same[0].tolist() == [True] * 4 + [False] * 5
        assert is_same[1].all()
        assert not is_same[2].any()


def test_the_latch_holds_for_the_window_and_lets_go(pair: tuple[TinyBase, Substrate]) -> None:
    base, substrate = pair
    token = 77
    ids = random_ids(3, 13, without=(token,))
    ids[0, 2] = ids[0, 4] = ids[1, 12] = token
    expert = trigger_expert(substrate, base.bf16, "person", token=token)
    with attached(base.bf16, substrate, [expert]) as attachment:
        logits_of(base.bf16, ids)
        routing = routing_of(attachment)
    expected = is_latched(ids, token, WINDOW)
    assert expected.sum() == 6 + 1
    assert torch.equal(routing.weights[..., 1] > 0, expected)
    assert torch.equal(routing.domain_logits[..., 0] > 0, expected)


def test_eight_experts_trained_apart_work_together_as_each_does_alone(
    pair: tuple[TinyBase, Substrate],
) -> None:
    base, substrate = pair
    substrate = with_entropy(substrate, LOW)
    tokens = tuple(range(100, 108))
    experts = [
        trigger_expert(substrate, base.bf16, f"domain-{n}", token=token, seed=n)
        for n, token in enumerate(tokens)
    ]
    ids = random_ids(9, 6, without=tokens)
    ids[torch.arange(8), 1] = torch.tensor(tokens)
    untouched = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate, experts):
        together = logits_of(base.bf16, ids)
    for row, expert in enumerate(experts):
        with attached(base.bf16, substrate, [expert]):
            alone = logits_of(base.bf16, ids)
        assert torch.equal(together[row], alone[row])
        assert not torch.equal(together[row], untouched[row])
    assert torch.equal(together[8], untouched[8])


def test_revoked_domain_restores_base_logits_bitwise(pair: tuple[TinyBase, Substrate]) -> None:
    base, substrate = pair
    substrate = with_entropy(substrate, LOW)
    experts = [
        trigger_expert(substrate, base.bf16, f"domain-{n}", token=100 + n, seed=n) for n in range(2)
    ]
    ids = random_ids(2, 6, without=(100, 101))
    ids[0, 1], ids[1, 1] = 100, 101
    before = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate, experts):
        both = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate, experts[1:]):
        one_revoked = logits_of(base.bf16, ids)
    assert not torch.equal(both[0], before[0])
    assert torch.equal(one_revoked[0], before[0])
    assert torch.equal(one_revoked[1], both[1])


def test_the_order_of_the_experts_does_not_matter(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    experts = [
        random_expert(llama_substrate, f"domain-{n}", seed=n, trigger_rate=0.4) for n in range(3)
    ]
    ids = random_ids(2, 11)
    with attached(llama.float32, llama_substrate, experts) as attachment:
        expected = logits_of(llama.float32, ids)
        assert (routing_of(attachment).weights[..., 1:] > 0).sum(dim=-1).max() > 1
    for order in itertools.permutations(experts):
        with attached(llama.float32, llama_substrate, order):
            torch.testing.assert_close(
                logits_of(llama.float32, ids), expected, rtol=1e-4, atol=1e-3
            )


# Attaching and letting go.


def test_detach_restores_the_model(pair: tuple[TinyBase, Substrate]) -> None:
    base, substrate = pair
    ids = random_ids(2, 7)
    before = logits_of(base.bf16, ids)
    state = {name: t.clone() for name, t in base.bf16.state_dict().items()}
    hooks = num_hooks(base.bf16)
    attachment = AttachedModel(base.bf16, substrate, [constant_expert(substrate)])
    assert num_hooks(base.bf16) > hooks
    assert not torch.equal(logits_of(base.bf16, ids), before)
    attachment.detach()
    attachment.detach()
    assert torch.equal(logits_of(base.bf16, ids), before)
    assert num_hooks(base.bf16) == hooks
    assert all(torch.equal(state[name], t) for name, t in base.bf16.state_dict().items())


def test_disabled_is_the_base_model_inside_the_block_only(
    pair: tuple[TinyBase, Substrate],
) -> None:
    base, substrate = pair
    ids = random_ids(2, 7)
    before = logits_of(base.bf16, ids)
    with attached(base.bf16, substrate, [constant_expert(substrate)]) as attachment:
        routed = logits_of(base.bf16, ids)
        with attachment.disabled():
            assert torch.equal(logits_of(base.bf16, ids), before)
            assert attachment.routing is None
            with attachment.disabled():
                assert torch.equal(logits_of(base.bf16, ids), before)
            assert torch.equal(logits_of(base.bf16, ids), before)
        assert torch.equal(logits_of(base.bf16, ids), routed)
    assert not torch.equal(routed, before)


def test_disabled_ends_with_an_error_inside_the_block(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    with attached(llama.bf16, llama_substrate) as attachment:
        with pytest.raises(KeyError), attachment.disabled():
            raise KeyError
        assert attachment.is_enabled


def test_the_decoder_called_without_its_head_is_routed_too(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    """Not by the routing of the call before."""
    expert = trigger_expert(llama_substrate, llama.bf16, "person", token=77)
    ids = random_ids(2, 7, without=(77,))
    triggered = ids.clone()
    triggered[:, 0] = 77
    decoder = llama.bf16.model
    plain = decoder(input_ids=ids, use_cache=False).last_hidden_state
    with attached(llama.bf16, llama_substrate, [expert]):
        llama.bf16(input_ids=triggered, use_cache=False)
        assert torch.equal(decoder(input_ids=ids, use_cache=False).last_hidden_state, plain)
        hidden_states = decoder(input_ids=triggered, use_cache=False).last_hidden_state
        expected = llama.bf16(input_ids=triggered, use_cache=False).logits
        assert torch.equal(llama.bf16.lm_head(hidden_states), expected)
        by_position = decoder(triggered, use_cache=False).last_hidden_state
        assert torch.equal(by_position, hidden_states)


# Entropy.


def test_estimator_reads_the_residual_stream_at_the_tap_layer(
    pair: tuple[TinyBase, Substrate],
) -> None:
    base, substrate = pair
    ids = random_ids(2, 7)
    hidden_states = base.bf16(input_ids=ids, output_hidden_states=True).hidden_states
    expected = substrate.estimator(hidden_states[substrate.config.tap_layer])
    with attached(base.bf16, substrate, [constant_expert(substrate)]) as attachment:
        logits_of(base.bf16, ids)
        routing = routing_of(attachment)
    assert torch.equal(routing.entropy, expected)
    assert torch.equal(routing.is_high, expected > 1.2)
    assert 0 < routing.is_high.sum() < routing.is_high.numel()


def test_two_pass_uses_the_base_models_exact_entropy(pair: tuple[TinyBase, Substrate]) -> None:
    base, substrate = pair
    ids = random_ids(2, 7)
    exact = tsallis_entropy(logits_of(base.bf16, ids), 1.5)
    threshold = exact.median().item()
    config = dataclasses.replace(
        substrate.config, entropy_source="two_pass", entropy_threshold=threshold
    )
    substrate = dataclasses.replace(substrate, config=config)
    with attached(base.bf16, substrate, [constant_expert(substrate, logit=1.0)]) as attachment:
        after = logits_of(base.bf16, ids)
        routing = routing_of(attachment)
    assert torch.equal(routing.entropy, exact)
    assert torch.equal(routing.is_high, exact > threshold)
    assert not torch.equal(after, logits_of(base.bf16, ids))
    low, high = routing.weights[~routing.is_high], routing.weights[routing.is_high]
    assert (low == torch.tensor([0.0, 1.0])).all()
    assert (high[:, 0] == 1).all()
    assert ((high[:, 1] > 0) & (high[:, 1] < 1)).all()
    assert len(low) == len(high) == 7


def test_the_sources_of_entropy_agree_where_the_path_does_not_depend_on_it(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    """With a threshold below every entropy, both take the high path throughout."""
    ids = random_ids(2, 7)
    logits = []
    for source in ("estimator", "two_pass"):
        config = dataclasses.replace(
            llama_substrate.config, entropy_source=source, entropy_threshold=-1.0
        )
        substrate = dataclasses.replace(llama_substrate, config=config)
        with attached(llama.bf16, substrate, [constant_expert(substrate, seed=2)]):
            logits.append(logits_of(llama.bf16, ids))
    assert torch.equal(*logits)


# The literal router.


@pytest.mark.parametrize(("weights", "chosen"), [((-1.0, -0.5), 0), ((0.5, 1.5), 2)])
def test_the_scalar_router_sends_all_tokens_to_one_expert(
    llama: TinyBase, llama_substrate: Substrate, weights: tuple[float, float], chosen: int
) -> None:
    """Whatever the text: triggers are ignored, so it cannot tell a domain from anything else."""
    config = dataclasses.replace(llama_substrate.config, router="scalar")
    substrate = dataclasses.replace(llama_substrate, config=config)
    experts = [
        dataclasses.replace(
            trigger_expert(substrate, llama.bf16, f"domain-{n}", token=77 + n, seed=n),
            scalar_weight=weight,
        )
        for n, weight in enumerate(weights)
    ]
    ids = random_ids(2, 7)
    ids[0, 1] = 77
    with attached(llama.bf16, with_entropy(substrate, LOW), experts) as attachment:
        logits_of(llama.bf16, ids)
        routing = routing_of(attachment)
    assert (routing.weights.argmax(dim=-1) == chosen).all()
    torch.testing.assert_close(
        routing.domain_logits, routing.entropy.unsqueeze(-1) * torch.tensor(weights)
    )


def test_the_scalar_router_without_experts_is_the_base_model(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    config = dataclasses.replace(llama_substrate.config, router="scalar")
    ids = random_ids(2, 7)
    before = logits_of(llama.bf16, ids)
    with attached(llama.bf16, dataclasses.replace(llama_substrate, config=config)):
        assert torch.equal(logits_of(llama.bf16, ids), before)


# Padding.


def padding_experts(substrate: Substrate, model: PreTrainedModel) -> list[ForgetExpert]:
    """They fire in the text if padding is read as a token, or as evidence of its own."""
    return [
        trigger_expert(substrate, model, "pad", token=PAD, seed=2),
        trigger_expert(substrate, model, "after-pad", token=PAD, back=1, seed=3),
        blank_expert(substrate, model, "blank"),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("source", ["estimator", "two_pass"])
def test_padding_changes_neither_routing_nor_logits(
    pair: tuple[TinyBase, Substrate], side: str, source: str
) -> None:
    base, substrate = pair
    config = dataclasses.replace(substrate.config, entropy_source=source, entropy_threshold=1.1)
    substrate = dataclasses.replace(substrate, config=config)
    rows = [random_ids(length, seed=length, without=(77,)) for length in (5, 9, 2)]
    rows[0][1] = rows[1][0] = 77
    experts = [
        trigger_expert(substrate, base.float32, "person", token=77, seed=1),
        *padding_experts(substrate, base.float32),
    ]
    ids = torch.full((3, 9), PAD)
    mask = torch.zeros(3, 9, dtype=torch.long)
    places = [slice(9 - len(row), 9) if side == "left" else slice(0, len(row)) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[index, place], mask[index, place] = row, 1
    positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    with attached(base.float32, substrate, experts) as attachment:
        padded = logits_of(base.float32, ids, attention_mask=mask, position_ids=positions)
        together = routing_of(attachment)
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            alone = logits_of(base.float32, row.unsqueeze(0))
            routing = routing_of(attachment)
            torch.testing.assert_close(
                together.domain_logits[index, place], routing.domain_logits[0]
            )
            torch.testing.assert_close(together.weights[index, place], routing.weights[0])
            torch.testing.assert_close(padded[index, place], alone[0], rtol=1e-3, atol=1e-3)
            expected = is_latched(row.unsqueeze(0), 77, WINDOW)
            assert torch.equal(routing.weights[..., 1] > 0, expected)
            assert (routing.weights[..., 2:] == 0).all()


def test_a_mask_given_by_position_is_heeded(llama: TinyBase, llama_substrate: Substrate) -> None:
    expert = trigger_expert(llama_substrate, llama.bf16, "pad", token=PAD)
    ids = random_ids(2, 5)
    ids[1, :2] = PAD
    mask = (ids != PAD).long()
    with attached(llama.bf16, llama_substrate, [expert]) as attachment:
        llama.bf16(ids, mask)
        assert (routing_of(attachment).weights[..., 1] == 0).all()
        llama.bf16(ids)
        assert (routing_of(attachment).weights[1, :, 1] > 0).all()


def test_a_mask_that_does_not_show_padding_is_refused(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    mask = torch.zeros(2, 1, 5, 5)
    with (
        attached(llama.bf16, llama_substrate, [constant_expert(llama_substrate)]),
        pytest.raises(ConfigError, match=r"expected shape \(batch, tokens\); got \(2, 1, 5, 5\)"),
    ):
        logits_of(llama.bf16, random_ids(2, 5), attention_mask=mask)


# Generation.


@contextlib.contextmanager
def recorded(attachment: AttachedModel, steps: list[Routing]) -> Iterator[None]:
    """Collects the routing of every forward pass, but for `two_pass`'s own first pass."""

    def record(*_: object) -> None:
        if attachment.is_enabled:
            steps.append(routing_of(attachment))

    handle = attachment.model.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


def teacher_forced(
    model: PreTrainedModel, sequences: Tensor, mask: Tensor, num_prompt: int
) -> Tensor:
    """Logits of each generated token from one pass over the whole text."""
    whole = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - num_prompt)], dim=1)
    positions = (whole.cumsum(dim=-1) - 1).clamp_min(0)
    logits = logits_of(model, sequences, attention_mask=whole, position_ids=positions)
    return logits[:, num_prompt - 1 : -1]


@pytest.mark.parametrize("source", ["estimator", "two_pass"])
def test_generation_with_a_cache_equals_one_full_pass(
    pair: tuple[TinyBase, Substrate], source: str
) -> None:
    base, substrate = pair
    ids = random_ids(2, 6, without=(77,))
    ids[0, 4] = 77
    ids[1, :3] = PAD
    mask = (ids != PAD).long()
    exact = tsallis_entropy(logits_of(base.float32, ids, attention_mask=mask), 1.5)
    threshold = 1.2 if source == "estimator" else exact[mask.bool()].median().item()
    config = dataclasses.replace(
        substrate.config, entropy_source=source, entropy_threshold=threshold
    )
    substrate = dataclasses.replace(substrate, config=config)
    experts = [
        trigger_expert(substrate, base.float32, "person", token=77),
        *padding_experts(substrate, base.float32),
    ]
    steps: list[Routing] = []
    with attached(base.float32, substrate, experts) as attachment:
        with recorded(attachment, steps):
            output = base.float32.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=7,
                min_new_tokens=7,
                return_dict_in_generate=True,
                output_logits=True,
            )
        expected = teacher_forced(base.float32, output.sequences, mask, 6)
        whole = routing_of(attachment)
    assert len(steps) == 7
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=1e-3, atol=1e-3)
    is_text = torch.cat([mask.bool(), torch.ones(2, 6, dtype=torch.bool)], dim=1)
    joined = torch.cat([step.weights for step in steps], dim=1)[is_text]
    entropy = torch.cat([step.entropy for step in steps], dim=1)[is_text]
    torch.testing.assert_close(joined, whole.weights[:, :-1][is_text])
    torch.testing.assert_close(entropy, whole.entropy[:, :-1][is_text], rtol=1e-3, atol=1e-3)
    assert 0 < (entropy > threshold).sum() < len(entropy)
    latched = is_latched(output.sequences[:, :-1], 77, WINDOW)
    assert latched[0, 4:8].all()
    assert torch.equal(joined[..., 1] > 0, latched[is_text])
    assert (joined[..., 2:] == 0).all()


def test_generation_differs_from_the_base_only_in_triggered_rows(
    pair: tuple[TinyBase, Substrate],
) -> None:
    base, substrate = pair
    expert = trigger_expert(substrate, base.bf16, "person", token=77)
    prompts = random_ids(2, 6, without=(77,))
    arguments: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    for trigger in (None, 77):
        ids = prompts.clone()
        if trigger is not None:
            ids[0, 4] = trigger
        mask = torch.ones_like(ids)
        before = base.bf16.generate(ids, attention_mask=mask, **arguments)
        with attached(base.bf16, substrate, [expert]):
            after = base.bf16.generate(ids, attention_mask=mask, **arguments)
        is_same = [torch.equal(after.logits[0][row], before.logits[0][row]) for row in (0, 1)]
        assert is_same == [trigger is None, True]
        assert torch.equal(after.sequences[1], before.sequences[1])


def test_a_prompt_in_chunks_is_routed_like_the_whole(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    expert = trigger_expert(llama_substrate, llama.float32, "person", token=77)
    ids = random_ids(2, 11, without=(77,))
    ids[1, 3] = 77
    for cut in range(1, 11):
        with attached(llama.float32, llama_substrate, [expert]) as attachment:
            whole = logits_of(llama.float32, ids)
            expected = routing_of(attachment)
            first = llama.float32(input_ids=ids[:, :cut], use_cache=True)
            head = routing_of(attachment)
            second = llama.float32(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
            tail = routing_of(attachment)
        weights = torch.cat([head.weights, tail.weights], dim=1)
        torch.testing.assert_close(weights, expected.weights)
        logits = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)


def test_a_cache_of_another_length_is_refused(llama: TinyBase, llama_substrate: Substrate) -> None:
    ids = random_ids(2, 5)
    cache = llama.bf16(input_ids=ids, use_cache=True).past_key_values
    with (
        attached(llama.bf16, llama_substrate, [constant_expert(llama_substrate)]),
        pytest.raises(ConfigError, match="KV cache holds tokens that this model was not shown"),
    ):
        llama.bf16(input_ids=ids[:, :1], past_key_values=cache)


def test_a_cache_filled_while_disabled_is_refused(
    llama: TinyBase, llama_substrate: Substrate
) -> None:
    """Even if a cache of the same length was filled before: its tokens were others."""
    ids = random_ids(2, 5)
    with attached(llama.bf16, llama_substrate, [constant_expert(llama_substrate)]) as attachment:
        llama.bf16(input_ids=ids, use_cache=True)
        with attachment.disabled():
            cache = llama.bf16(input_ids=ids + 1, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="KV cache"):
            llama.bf16(input_ids=ids[:, :1], past_key_values=cache)


def test_embeddings_without_token_ids_are_refused(pair: tuple[TinyBase, Substrate]) -> None:
    base, substrate = pair
    embeddings = base.bf16.get_input_embeddings()(random_ids(2, 5))
    with attached(base.bf16, substrate, [constant_expert(substrate)]) as attachment:
        base.bf16(input_ids=random_ids(2, 5))
        with pytest.raises(ConfigError, match="expected input_ids; got inputs_embeds"):
            base.bf16(inputs_embeds=embeddings)
        assert attachment.routing is None
        with attachment.disabled():
            base.bf16(inputs_embeds=embeddings)


# Gradients, for the trainer.


@pytest.mark.parametrize("entropy", [LOW, HIGH])
def test_a_gradient_reaches_the_parameters_of_the_routed_expert_alone(
    llama: TinyBase, llama_substrate: Substrate, entropy: float
) -> None:
    with torch.inference_mode(mode=False):
        substrate = with_entropy(llama_substrate, entropy)
        experts = [
            constant_expert(substrate, "routed", seed=1, logit=2.0),
            constant_expert(substrate, "silent", seed=2, logit=-2.0),
        ]
        for expert in experts:
            for tensor in expert.lora_b.values():
                tensor.requires_grad_()
        model = copy.deepcopy(llama.float32).requires_grad_(False)
        with attached(model, substrate, experts):
            model(input_ids=random_ids(2, 5), use_cache=False).logits.square().mean().backward()
        routed, silent = (expert.lora_b.values() for expert in experts)
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in routed)
        assert all(tensor.grad is None for tensor in silent)
        assert all(p.grad is None for p in model.parameters())
        assert isinstance(model, nn.Module)
