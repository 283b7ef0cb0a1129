"""The demo model's tokenizer: byte-level BPE learned from general text, and its chat template.

It never sees the authors' rows, so their names fall into several tokens, as they would under the
tokenizer of any real model. There is no start token: a rendered chat gives the same ids whether
or not a caller asks for special tokens to be added.

    <|user|>QUESTION<|assistant|>ANSWER<|eos|>
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alter_cli.demo.corpus import QA

USER, ASSISTANT, EOS, PAD = "<|user|>", "<|assistant|>", "<|eos|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + EOS + ""
    "{% else %}{{ raise_exception("
    "'the demo model knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_positions: int = 1024
) -> PreTrainedTokenizerFast:
    """Learn byte-level BPE of at most `vocab_size` tokens, the four special ones included.

    `max_positions` is the longest sequence, in tokens, that the tokenizer lets pass unremarked.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerFast, row: QA) -> tuple[list[int], list[int]]:
    """Token ids of a row as (prompt, answer); the prompt ends with the assistant's mark, the
    answer with the end token, and their concatenation is the whole chat."""
    messages = [{"role": "user", "content": row.question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    messages.append({"role": "assistant", "content": row.answer})
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    answer = full[len(prompt) :]
    return tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
