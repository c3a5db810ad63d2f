"""Prompts as the policy reads them: rows of data sources, templates and token ids.

Text of users is never encoded into control tokens: those of every row are compared with those of its bare template.
"""

from paced_fast.prompts.overlap import Overlap, duplicates, overlap
from paced_fast.prompts.table import load_table
from paced_fast.prompts.tokenizers import character_tokenizer, decode, load_tokenizer, stop_token_ids

__all__ = [
    "Overlap",
    "character_tokenizer",
    "decode",
    "duplicates",
    "load_table",
    "load_tokenizer",
    "overlap",
    "stop_token_ids",
]
