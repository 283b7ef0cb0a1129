"""Converts llama2.c's `stories260K` to transformers layout, for a test on a real pretrained model.

Its heads have 8 dimensions, fewer than vLLM's CPU attention takes. They are padded to 32 without changing
what the model computes: rotary pair i of 4 becomes pair 4 i of 16, which turns at the same frequency, the
rest is zero, and q is doubled for the softmax's 1 / sqrt(head size).

Legend: L layers, D hidden, F feed-forward, H heads, K key-value heads, V vocabulary.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_PADDED_HEAD = 32


def convert_stories(folder: Path, out: Path) -> Path:
    """Writes a transformers model folder from `stories260K.bin` and `tok512.bin`."""
    data = (folder / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", data[:28])
    weights = _Reader(np.frombuffer(data[28:], dtype=np.float32))
    head = dim // heads
    state: dict[str, Tensor] = {"model.embed_tokens.weight": weights.take(vocab, dim)}
    stacked = {
        "input_layernorm": weights.take(layers, dim),
        "self_attn.q_proj": weights.take(layers, heads * head, dim),
        "self_attn.k_proj": weights.take(layers, kv_heads * head, dim),
        "self_attn.v_proj": weights.take(layers, kv_heads * head, dim),
        "self_attn.o_proj": weights.take(layers, dim, heads * head),
        "post_attention_layernorm": weights.take(layers, dim),
        "mlp.gate_proj": weights.take(layers, hidden, dim),
        "mlp.down_proj": weights.take(layers, dim, hidden),
        "mlp.up_proj": weights.take(layers, hidden, dim),
    }
    state["model.norm.weight"] = weights.take(dim)
    rotary = _rotary_places(head)
    plain = torch.arange(head)
    for name, tensors in stacked.items():
        for layer in range(layers):
            tensor = tensors[layer]
            if name == "self_attn.q_proj":
                tensor = 2 * _pad_heads(tensor, heads, rotary)
            elif name == "self_attn.k_proj":
                tensor = _pad_heads(tensor, kv_heads, rotary)
            elif name == "self_attn.v_proj":
                tensor = _pad_heads(tensor, kv_heads, plain)
            elif name == "self_attn.o_proj":
                tensor = _pad_heads(tensor.T, heads, plain).T.contiguous()
            state[f"model.layers.{layer}.{name}.weight"] = tensor
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_PADDED_HEAD,
        vocab_size=vocab,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    _tokenizer(folder / "tok512.bin", vocab).save_pretrained(out)
    return out


class _Reader:
    def __init__(self, values: np.ndarray) -> None:
        self._values, self._at = values, 0

    def take(self, *shape: int) -> Tensor:
        """The next tensor of the file."""
        size = int(np.prod(shape))
        values = self._values[self._at : self._at + size]
        self._at += size
        return torch.from_numpy(values.copy()).view(*shape)


def _rotary_places(head: int) -> Tensor:
    """Row of the padded head for each row of the file's.

    The file's rotary pairs are neighbours, those of transformers lie half a head apart.
    """
    pair = torch.arange(head) // 2
    is_second = torch.arange(head) % 2
    return pair * (_PADDED_HEAD // head) + is_second * (_PADDED_HEAD // 2)


def _pad_heads(weight_HD: Tensor, num_heads: int, places: Tensor) -> Tensor:
    """Shapes: (H * head, D) -> (H * padded head, D)."""
    heads = weight_HD.reshape(num_heads, len(places), -1)
    padded = torch.zeros(num_heads, _PADDED_HEAD, heads.shape[-1])
    padded[:, places] = heads
    return padded.flatten(0, 1)


def _tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The file's SentencePiece BPE: pieces with scores, byte fallback, a space before the text."""
    data = path.read_bytes()
    pieces, at = [], 4
    for _ in range(vocab_size):
        score, length = struct.unpack_from("fi", data, at)
        text = data[at + 8 : at + 8 + length].decode("utf-8")
        pieces.append((text.strip("\n") if text in ("\n<s>\n", "\n</s>\n") else text, score))
        at += 8 + length
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [text.replace(" ", "▁") for text, _ in pieces[len(names) :]]
    vocabulary = {name: index for index, name in enumerate(names)}
    ranked = sorted(range(259, vocab_size), key=lambda index: -pieces[index][1])
    merges = [
        (names[index][:cut], names[index][cut:])
        for index in ranked
        for cut in range(1, len(names[index]))
        if names[index][:cut] in vocabulary and names[index][cut:] in vocabulary
    ]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
