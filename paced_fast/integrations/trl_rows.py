"""Rows in which the completions of a prompt share it, in place of TRL's one padded row a completion.

A prompt is computed once for its completions in the micro-batch, and padding is left out. Every completion sees the
prompt and itself, at the positions that it has alone, so its log-probs stay the same.

B = sequences, P = longest prompt, C = longest completion, T = completion tokens, R = rows of at most L tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from paced_fast.data.packing import cu_seqlens
from paced_fast.data.records import Rollouts
from paced_fast.errors import pip_install
from paced_fast.integrations.trl_head import Completions
from paced_fast.policy.families import is_plain
from paced_fast.policy.micro_batches import forward_rows, row_lengths

try:
    from trl.models.utils import disable_gradient_checkpointing
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.trl needs TRL ({error}): {pip_install('trl')}") from error


class SharedRows(NamedTuple):
    """What a model is given, and where it returns the states that predict the completion tokens."""

    inputs: dict[str, Tensor]
    hidden_index: Tensor  # i64[T], positions in the flattened states [R * L]


def can_share(wrapped: Any, base: Any) -> bool:
    """Return whether `base`, a causal language model, perhaps with the adapters of `wrapped`, can be given
    `shared_rows`."""
    adapters = getattr(wrapped, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return False  # its virtual tokens need a mask of their own
    settings = base.config
    has_mask = settings._attn_implementation == "sdpa"  # the others take no mask of four dimensions, or no booleans
    return has_mask and is_plain(settings) and getattr(settings, "sliding_window", None) is None


def handed_to_model(
    trainer: Any,
    input_ids: Tensor,  # i64[B, P + C]
    attention_mask: Tensor,  # [B, P + C]
    rows: Completions,
) -> dict[str, Any]:
    """Return what the model reads, and note in `rows` where its states will be."""
    if trainer.shares_prompts:
        width = rows.mask.shape[1]
        dtype = trainer.model.dtype if trainer.accelerator.mixed_precision == "no" else None
        size = trainer.model.config.hidden_size
        found = shared_rows(input_ids, attention_mask, width, hidden_size=size, dtype=dtype)
        if found is not None:
            rows.index = found.hidden_index[rows.mask[attention_mask[:, -width:].bool()]]
            return found.inputs
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def add_old_logprobs(trainer: Any, batches: list[dict[str, Any]]) -> None:
    """Score the micro-batches that are trained on after a step has changed the policy.

    Up to that step the policy is the old one, and the loss takes its own log-probs.
    """
    args = trainer.args
    window, per_batch = args.gradient_accumulation_steps, args.steps_per_generation
    if window % (per_batch * trainer.num_iterations) == 0:
        return
    is_whole = trainer.num_iterations == 1 and per_batch % window == 0
    first = window if is_whole else 0
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
        for batch in batches[first:]:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            shown = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            width = batch["completion_ids"].shape[1]
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, shown, width)
            batch["old_per_token_logps"] = found[0]


def shared_rows(
    ids: Tensor,  # i64[B, P + C]
    shown: Tensor,  # [B, P + C], 0 before a prompt and after a completion
    width: int,  # C
    *,
    hidden_size: int,
    dtype: torch.dtype | None,
) -> SharedRows | None:
    """Lay the sequences out so that the model computes least; None where TRL's own rows are no worse.

    The mask is added to scores in `dtype`; None makes a boolean mask, for a model that computes under autocast.
    """
    mask = shown.bool()
    lengths = mask[:, -width:].sum(1)
    order = torch.arange(width, device=ids.device)
    if not torch.equal(mask[:, -width:], order < lengths[:, None]):
        return None  # holes: a token of the completion does not see all that precede it
    rollouts = _rollouts(ids, mask, width, lengths.tolist())
    chosen = _best_limit(rollouts, ids.shape, hidden_size)
    if chosen is None:
        return None
    rows = forward_rows(rollouts, chosen)
    seen = rows.attention_mask
    if dtype is not None:
        seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    inputs = {"input_ids": rows.input_ids, "attention_mask": seen, "position_ids": rows.position_ids}
    return SharedRows(inputs, rows.hidden_index)


def _rollouts(ids: Tensor, mask: Tensor, width: int, lengths: list[int]) -> Rollouts:
    """The sequences as packed rollouts; only tokens and lengths matter for a layout."""
    count, device = len(ids), ids.device
    pairs = zip(ids[:, :-width].tolist(), mask[:, :-width].tolist(), strict=True)
    zeros = torch.zeros(count, device=device)
    token_ids = ids[:, -width:][mask[:, -width:]]
    return Rollouts(
        token_ids=token_ids,
        cu_seqlens=cu_seqlens(lengths, device),
        lengths=tuple(lengths),
        prompt_ids=tuple(tuple(i for i, own in zip(row, seen, strict=True) if own) for row, seen in pairs),
        prompt_index=zeros.long(),
        rewards=zeros,
        shaping=zeros,
        scored=(True,) * count,
        generator_logprobs=torch.zeros_like(token_ids, dtype=torch.float32),
        policy_version=zeros.long(),
    )


def _best_limit(rollouts: Rollouts, padded: torch.Size, hidden_size: int) -> int | None:
    """Length of rows with the fewest operations, padding and masked scores included; None if TRL's have fewer."""

    def work(rows: int, length: int) -> int:
        # A layer multiplies a token by about 12 H^2 weights, and attends to L tokens with 2 H operations each.
        return rows * length * (6 * hidden_size + length)

    longest = max(map(len, rollouts.prompt_ids))
    more = max(max(rollouts.lengths) - 1, 1)
    best, least = None, work(*padded)
    for members in range(1, rollouts.num_sequences + 1):
        limit = longest + members * more
        found = row_lengths(rollouts, limit)
        if work(len(found), max(found)) < least:
            best, least = limit, work(len(found), max(found))
    return best


def regrouped(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deal the rows of TRL's shuffled micro-batches out again, with the completions of a prompt next to each other.

    Groups keep the order in which the shuffle has them first, and every micro-batch its number of rows. Batches that
    hold anything but tensors are returned as they are.
    """
    first = batches[0]
    is_plain_batch = all(value is None or isinstance(value, Tensor) for value in first.values())
    if len(batches) == 1 or not is_plain_batch:
        return batches
    # Prompts of all micro-batches are padded to one length, so equal rows are equal prompts.
    prompts = [tuple(row) for batch in batches for row in (batch["prompt_ids"] * batch["prompt_mask"]).tolist()]
    seen = {prompt: k for k, prompt in reversed(list(enumerate(prompts)))}
    order = torch.tensor(sorted(range(len(prompts)), key=lambda i: (seen[prompts[i]], i)))
    whole = {
        name: torch.cat([batch[name] for batch in batches])[order.to(value.device)]
        for name, value in first.items()
        if value is not None and value.ndim > 0
    }
    size = len(first["prompt_ids"])
    return [
        {name: whole[name][k * size : (k + 1) * size] if name in whole else value for name, value in batch.items()}
        for k, batch in enumerate(batches)
    ]
