"""A tokenizer of bytes with control tokens, and a chat template for it."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


START, END, THINK, BOS = 256, 257, 258, 259  # after the 256 bytes


def byte_tokenizer(*, begin: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, two special tokens and one structural token that is not flagged special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    if begin:
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def plain_ids(tokenizer, text: str) -> list[int]:
    """Byte ids of a text, whatever it reads like."""
    alphabet = tokenizer.backend_tokenizer.get_vocab()
    return [alphabet[_byte_character(byte)] for byte in text.encode()]


def _byte_character(byte: int) -> str:
    """GPT-2's printable stand-in of a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))
