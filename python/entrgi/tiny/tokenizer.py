"""The tokenizer of the tiny models: byte-level BPE trained on the grammar, chat template in the Qwen (ChatML) form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
MASK = "<|mask|>"
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, model_max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Train the tokenizer on texts of the grammar.

    Args:
        texts: prompts and reviews.
        vocab_size: the size asked for; the grammar fills less.
        model_max_length: written into the tokenizer's config.

    Returns:
        A ``PreTrainedTokenizerFast`` whose end-of-text token is its padding token too, as Dream's is: a response is
        filled up with it. ``<|im_end|>`` ends a turn and is never a padding token. Pads go to the left.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 4,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Role names are written by the chat template only; they must be words of the vocabulary all the same.
    backend.train_from_iterator([*texts, *(ROLES * 50)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[EOS, START, END, MASK],
        padding_side="left",
        truncation_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a user turn with the assistant's turn opened."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def split_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[int]]:
    """(prefix, suffix) ids around the response of a finished chat: what a reward model reads before and after it."""
    marker = "\x00"
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    before, _, after = text.rpartition(marker)
    ids = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1]
