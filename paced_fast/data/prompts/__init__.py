"""Prompts as the policy reads them: rows of data sources, templates and token ids.

User text is never encoded into control tokens: the control tokens of every row are compared with those of its bare
template.
"""

from paced_fast.data.prompts.chat import ChatSettings, reads_date
from paced_fast.data.prompts.overlap import Overlap, duplicates, overlap
from paced_fast.data.prompts.stop_tokens import Decoder, Stops, decode, find_stops, stop_token_ids
from paced_fast.data.prompts.table import load_table
from paced_fast.data.prompts.tokenizers import (
    ALPHABETS,
    alphabet_tokenizer,
    character_tokenizer,
    check_embedded,
    declared_stop_ids,
    load_tokenizer,
    num_embedded,
    num_ids,
)

__all__ = [
    "ALPHABETS",
    "ChatSettings",
    "Decoder",
    "Overlap",
    "Stops",
    "alphabet_tokenizer",
    "character_tokenizer",
    "check_embedded",
    "declared_stop_ids",
    "decode",
    "duplicates",
    "find_stops",
    "load_table",
    "load_tokenizer",
    "num_embedded",
    "num_ids",
    "overlap",
    "reads_date",
    "stop_token_ids",
]
