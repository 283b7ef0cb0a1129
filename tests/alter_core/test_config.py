"""Impossible settings are refused where they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter_core import AlterConfig, max_tsallis_entropy
from alter_core.config import SITE_KINDS
from alter_core.errors import ConfigError

POSITIVE_FIELDS = (
    "rank",
    "lora_alpha",
    "tsallis_q",
    "temperature_high",
    "top_k",
    "evidence_window",
    "evidence_ngram",
    "evidence_units",
)


def test_defaults_are_the_papers_settings_and_our_readings() -> None:
    config = AlterConfig(tap_layer=2)
    assert (config.rank, config.entropy_threshold, config.tsallis_q) == (32, 1.2, 1.5)
    assert (config.temperature_high, config.top_k) == (0.8, 3)
    assert (config.router, config.retain_expert, config.entropy_source) == (
        "evidence",
        "identity",
        "estimator",
    )
    assert config.target_modules == SITE_KINDS


def test_scaling_is_alpha_over_rank() -> None:
    assert AlterConfig(tap_layer=0, rank=4, lora_alpha=6).scaling == 1.5


@pytest.mark.parametrize("q", [1.8334, 1.9, 3.0])
def test_a_threshold_that_q_can_never_reach_is_refused(q: float) -> None:
    with pytest.raises(ConfigError, match=r"1\.2 can never be exceeded with tsallis_q") as caught:
        AlterConfig(tap_layer=0, tsallis_q=q, entropy_threshold=1.2)
    assert f"{1 / (q - 1):.3f}" in str(caught.value)
    assert caught.value.fix is not None


def test_a_threshold_equal_to_the_bound_is_out_of_reach_too() -> None:
    assert max_tsallis_entropy(2.0) == 1.0
    with pytest.raises(ConfigError):
        AlterConfig(tap_layer=0, tsallis_q=2.0, entropy_threshold=1.0)


@given(st.floats(0.05, 5.0), st.floats(0.0, 10.0))
def test_a_threshold_is_accepted_exactly_if_some_entropy_exceeds_it(
    q: float, threshold: float
) -> None:
    if threshold < max_tsallis_entropy(q):
        assert AlterConfig(tap_layer=0, tsallis_q=q, entropy_threshold=threshold).tsallis_q == q
    else:
        with pytest.raises(ConfigError):
            AlterConfig(tap_layer=0, tsallis_q=q, entropy_threshold=threshold)


@pytest.mark.parametrize("field", POSITIVE_FIELDS)
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_setting_that_must_be_positive_is_refused_otherwise(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is out of range.*expected.*got"):
        AlterConfig(**{"tap_layer": 0, field: value})


@pytest.mark.parametrize("field", ["lora_alpha", "tsallis_q", "temperature_high"])
def test_an_infinite_setting_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        AlterConfig(**{"tap_layer": 0, field: math.inf})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_threshold_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="entropy_threshold"):
        AlterConfig(tap_layer=0, tsallis_q=0.5, entropy_threshold=value)


def test_a_negative_tap_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tap_layer"):
        AlterConfig(tap_layer=-1)


@pytest.mark.parametrize(
    "targets", [(), ("q_proj",), ("qkv", "experts"), "qkv", ("qkv", "o", "qkv")]
)
def test_target_modules_that_match_nothing_or_twice_are_refused(targets: Any) -> None:
    with pytest.raises(ConfigError, match="target_modules") as caught:
        AlterConfig(tap_layer=0, target_modules=targets)
    assert "qkv, o, gate_up, down" in str(caught.value)


def test_target_modules_may_be_any_sequence_and_become_a_tuple() -> None:
    targets: Any = ["o", "down"]
    config = AlterConfig(tap_layer=0, target_modules=targets)
    assert config.target_modules == ("o", "down")
    assert hash(config) == hash(AlterConfig(tap_layer=0, target_modules=("o", "down")))


@pytest.mark.parametrize("field", ["retain_expert", "entropy_source", "router"])
def test_an_unknown_choice_is_refused(field: str) -> None:
    settings: dict[str, Any] = {"tap_layer": 0, field: "other"}
    with pytest.raises(ConfigError, match=f"{field}.*expected.*got other"):
        AlterConfig(**settings)


def test_a_config_is_frozen_and_keyword_only() -> None:
    config = AlterConfig(tap_layer=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        AlterConfig(8)  # type: ignore[misc, call-arg]


def test_tap_layer_has_no_default_since_it_depends_on_the_model() -> None:
    with pytest.raises(TypeError, match="tap_layer"):
        AlterConfig()  # type: ignore[call-arg]
