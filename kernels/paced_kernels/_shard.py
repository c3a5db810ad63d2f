"""Vocabulary split over ranks."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's part of a vocabulary-parallel head: `head_weight` holds ids start .. start + len(head_weight) - 1.

    Every rank of `group` passes the same hidden states, token ids and sequence arguments, and its own rows of the
    weight. Every rank receives the same log-probs, loss and gradient of the hidden states, and the gradient of its own
    rows. Shards may differ in size, and together they must cover [0, vocab_size) exactly once. `workspace_bytes` holds
    for an even share: all ranks process the same rows at a time, so a larger shard gets proportionally more workspace.
    """

    group: Any
    """torch.distributed.ProcessGroup of the ranks that share the head."""
    start: int
    """First token id of this rank."""
    vocab_size: int
    """Size of the whole vocabulary."""
