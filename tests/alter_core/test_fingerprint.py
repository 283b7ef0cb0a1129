"""Two base models have one fingerprint exactly if a bundle of one serves the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from alter_core import BaseModelInfo
from alter_core.errors import UnsupportedModelError
from tests.alter_core.conftest import TinyBase
from tests.support.tiny import load_model, save_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(llama: TinyBase, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def fingerprint(folder: Path) -> str:
    return BaseModelInfo.from_folder(folder).fingerprint


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_info_names_the_model_and_its_sizes(llama: TinyBase) -> None:
    info = BaseModelInfo.from_folder(llama.folder)
    assert info.name == llama.folder.name
    assert info.architecture == "LlamaForCausalLM"
    assert (info.hidden_size, info.num_layers, info.vocab_size) == (128, 3, 512)
    assert len(bytes.fromhex(info.fingerprint)) == 32


def test_the_same_model_saved_again_elsewhere_has_the_same_fingerprint(
    base: TinyBase, tmp_path: Path
) -> None:
    load_model(base.folder).save_pretrained(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(base.folder)


def test_sharded_and_single_file_weights_have_the_same_fingerprint(
    base: TinyBase, tmp_path: Path
) -> None:
    load_model(base.folder).save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "sharded") == fingerprint(base.folder)


def test_it_does_not_matter_which_shard_holds_which_tensor(folder: Path) -> None:
    before = fingerprint(folder)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors, reverse=True)
    for shard in range(3):
        safetensors.torch.save_file(
            {name: tensors[name] for name in names[shard::3]},
            folder / f"model-{shard}-of-3.safetensors",
        )
    assert fingerprint(folder) == before


def test_models_of_every_architecture_and_seed_differ(
    bases: dict[str, TinyBase], tmp_path: Path
) -> None:
    folders = [base.folder for base in bases.values()]
    folders.append(save_model(tmp_path / "other-seed", "llama", seed=5))
    assert len({fingerprint(folder) for folder in folders}) == len(folders)


@pytest.mark.parametrize("row", [0, -1])
def test_one_changed_weight_in_a_sampled_place_changes_the_fingerprint(
    folder: Path, row: int
) -> None:
    names = list(safetensors.torch.load_file(folder / WEIGHTS))
    seen = {fingerprint(folder)}
    for name in names[::5]:
        edit_weights(folder, lambda tensors, name=name: tensors[name][row].view(-1)[0].add_(1))
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(names[::5])


def test_training_all_weights_a_little_changes_the_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    edit_weights(folder, lambda tensors: [t.mul_(1.01) for t in tensors.values()])
    assert fingerprint(folder) != before


def test_a_renamed_reshaped_or_recast_tensor_changes_the_fingerprint(folder: Path) -> None:
    """Even where order and sampled bytes stay the same."""
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name].zero_())
    original = safetensors.torch.load_file(folder / WEIGHTS)
    seen = {fingerprint(folder)}
    for edit in (
        lambda tensors: tensors.update({f"{name}2": tensors.pop(name)}),
        lambda tensors: tensors.update({name: tensors[name].reshape(192, 128)}),
        lambda tensors: tensors.update({name: tensors[name].half()}),
        lambda tensors: tensors.pop(name),
    ):
        safetensors.torch.save_file(original, folder / WEIGHTS)
        edit_weights(folder, edit)
        seen.add(fingerprint(folder))
    assert len(seen) == 5


def test_swapping_two_tensors_changes_the_fingerprint(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    before = fingerprint(folder)
    edit_weights(folder, swap)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-3}, {"rope_theta": 5.0}, {"tie_word_embeddings": True}, {"new": 1}],
)
def test_a_setting_that_changes_the_function_changes_the_fingerprint(
    folder: Path, change: dict[str, Any]
) -> None:
    before = fingerprint(folder)
    edit_config(folder, lambda config: config.update(change))
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "elsewhere"},
        {"transformers_version": "9.9.9"},
        {"dtype": "float32"},
        {"torch_dtype": "float16"},
        {"use_cache": False},
    ],
)
def test_a_setting_that_only_tells_how_it_was_saved_does_not(
    folder: Path, change: dict[str, Any]
) -> None:
    before = fingerprint(folder)
    edit_config(folder, lambda config: config.update(change))
    assert fingerprint(folder) == before


def test_neither_key_order_nor_other_files_nor_metadata_matter(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    (folder / "README.md").write_text("hello")
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"made-by": "someone"})
    assert fingerprint(folder) == before


def test_scalars_and_empty_tensors_are_no_obstacle(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "one": torch.ones(1)}

    before = fingerprint(folder)
    edit_weights(folder, add)
    assert fingerprint(folder) != before


def test_a_folder_that_is_missing_or_without_config_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UnsupportedModelError, match=r"expected .*config\.json") as caught:
            BaseModelInfo.from_folder(folder)
        assert str(folder) in str(caught.value)
        assert caught.value.fix is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UnsupportedModelError, match="base model cannot be read"):
        BaseModelInfo.from_folder(folder)


def test_a_model_without_safetensors_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"expected \*\.safetensors.*got none"):
        BaseModelInfo.from_folder(folder)


def test_torn_weights_are_refused(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsupportedModelError, match="not a readable safetensors file"):
        BaseModelInfo.from_folder(folder)


@pytest.mark.parametrize("architectures", [None, [], ["MixtralForCausalLM"]])
def test_an_unsupported_architecture_is_refused(folder: Path, architectures: Any) -> None:
    edit_config(folder, lambda config: config.update(architectures=architectures))
    with pytest.raises(UnsupportedModelError, match="not supported"):
        BaseModelInfo.from_folder(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_config_without_sizes_is_refused(folder: Path, key: str) -> None:
    edit_config(folder, lambda config: config.pop(key))
    with pytest.raises(UnsupportedModelError, match=f"does not tell.*{key}"):
        BaseModelInfo.from_folder(folder)
