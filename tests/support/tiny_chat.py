"""A small chat model: a tokenizer of bytes with control tokens and tags, and a folder that holds both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y, %H:%M') }}.\n" + CHAT
THINKING = CHAT.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif",
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|observation|>", "<answer>", "</answer>")
PLAIN = ("<think>", "</think>")  # added, and not flagged special


def tokenizer(template: str | None = CHAT, *, special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """256 bytes, then the special tokens in their order, then the plain ones; text ends at <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    made.eos_token = "<|endoftext|>"
    made.chat_template = template
    return made


def words(made: Any, template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece, which drops the blank before the first word of a text."""
    vocabulary = {piece: i for i, piece in enumerate(made)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=made[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    found = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, eos_token=made[1])
    found.chat_template = template
    return found


def save(
    folder: Path, made: PreTrainedTokenizerFast, *, stops: Any = None, rows: int | None = None, seed: int = 0
) -> str:
    """Write a model of `rows` embeddings, as many as the tokenizer has unless given, that stops at `stops`."""
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=rows or len(made),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({} if stops is None else {"eos_token_id": stops}))
    return str(folder)
