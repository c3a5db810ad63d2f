"""Trajectory balance in a training loop of your own: from a Hugging Face model and a padded batch to loss and metrics.

    from paced_fast.integrations.own_loop import balance_loss, completion_logprobs

    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
    old = completion_logprobs(model, **batch)                       # once, before the first update on this batch
    for _ in range(updates):
        loss, metrics = balance_loss(model, **batch, rewards=rewards, group_size=8, old_logprobs=old, beta=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The model runs its own forward pass, but its output layer is replaced by the fused operation, so the [B, L, V] logits
never exist. Prompts may differ in length, padding may be on either side, completions may be empty, and a wrapper such
as PEFT's or DDP is called as it is. An output layer that is split over ranks (FSDP, ZeRO 3) is not supported here:
`paced_fast.integrations.trl.PacedTrainer` is for those.

The loss is that of `paced_fast.integrations.losses`. At the policy that sampled, its gradient is that of REINFORCE with
the value as baseline, whatever beta is.

B = sequences, L = padded length, T = completion tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from paced_fast.errors import InputError
from paced_fast.integrations.losses import Balance, group_log_z, loss_from_hidden, loss_from_logprobs, offsets, packed
from paced_fast.policy import linear_options
from paced_fast.policy.capped import capped_logprobs
from paced_fast.policy.families import Family, examine, head_states, is_plain, output_layer, takes
from paced_kernels import linear_logprobs

Metrics = dict[str, Tensor]


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,  # [B, L]
    attention_mask: Tensor,  # [B, L]
    completion_mask: Tensor,  # [B, L]
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs of the completion tokens under the model as it is now, without gradients and without full logits.

    Call it before the first update on a batch, in the mode (`train` or `eval`) in which the batch is trained on.

    Args:
        model, input_ids, attention_mask, completion_mask, temperature: as for `balance_loss`.

    Returns:
        f32[B, L], aligned with `input_ids`: entry t is the log-prob of token t; 0 outside completions.

    Raises:
        InputError: as for `balance_loss`.
    """
    with torch.no_grad():
        rows = _rows(model, input_ids, attention_mask, completion_mask)
        return rows.pad(rows.logprobs(temperature))


def balance_loss(
    model: nn.Module,
    input_ids: Tensor,  # [B, L]
    attention_mask: Tensor,  # [B, L]
    completion_mask: Tensor,  # [B, L]
    *,
    rewards: Tensor | Sequence[float],  # [B]
    beta: float = 0.05,
    values: Tensor | Sequence[float] | None = None,  # [B]
    groups: Sequence[Hashable] | Tensor | None = None,
    group_size: int | None = None,
    old_logprobs: Tensor | None = None,  # [B, L] or [B, L - 1]
    weights: Tensor | Sequence[float] | None = None,  # [B]
    importance_cap: float = 1.28,
    temperature: float = 1.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Trajectory-balance loss of a padded batch, and figures to log.

    Give the value of each prompt by one of `values`, `groups` and `group_size`.

    Args:
        model: causal language model of transformers, alone or wrapped by PEFT or DDP.
        input_ids: tokens of prompt and completion, padded on either side or both.
        attention_mask: 1 on tokens, 0 on padding.
        completion_mask: 1 on the tokens that the policy chose and the reward judges, 0 on prompt and padding. An empty
            completion counts like any other, but in a batch without any token (every completion cut off and masked,
            say) the loss and all its gradients are 0, as in TRL.
        rewards: raw rewards, neither centred nor scaled; NaN excludes a completion from the loss and from its group.
        beta: reward units per nat: the weight of staying near the old policy.
        values: predicted reward of each row's prompt, beta * log Z; gradients flow here, so it may be learned.
        groups: name of each row's prompt; the value is then the mean reward of the rows of that name.
        group_size: the same for completions of a prompt in consecutive rows, so many each.
        old_logprobs: what `completion_logprobs` returned before the first update on this batch, or the sampler's
            log-probs; [B, L - 1] is aligned with `input_ids[:, 1:]`. None: the policy in training, correct if the
            batch is used for a single optimiser step.
        weights: constant factor of each row; 0 excludes a completion.
        importance_cap: upper bound of the importance weight exp(s - s_old).
        temperature: at which the completions were sampled; divides the logits.
        denominator: divisor of the sum over completions; None: the number of rows with a reward. With gradient
            accumulation give the number of rows of the whole step, so that splitting it does not change the gradient.

    Returns:
        The loss, and detached scalar tensors: `reward`, `value`, `residual_rms` (reward units), `log_ratio` (nats),
        `importance_weight` (means over rows with a reward), `entropy` (nats per token) and `tokens` (per completion).

    Raises:
        InputError: shapes, masks or the model do not fit; one line that names the argument and the remedy.
    """
    rows = _rows(model, input_ids, attention_mask, completion_mask)
    device = rows.hidden.device
    reward = _per_row("rewards", rewards, len(input_ids), device)
    known = ~reward.isnan()
    reward = torch.where(known, reward, 0.0)
    weight = known.float() * rows.mask.any()
    if weights is not None:
        weight = weight * _per_row("weights", weights, len(input_ids), device)
    if sum(given is not None for given in (values, groups, group_size)) != 1:
        raise InputError("give one of values (one per row), groups (the prompt of each row) and group_size")
    if values is not None:
        value = _per_row("values", values, len(input_ids), device)
    else:
        value = beta * group_log_z(
            reward / beta, _names(groups, group_size, len(input_ids)), group_size=group_size, scored=known
        )
    out = rows.balance(
        old_logprobs=None if old_logprobs is None else rows.pack(_aligned(old_logprobs, input_ids)),
        temperature=temperature,
        rewards=reward,
        log_z=value / beta,
        beta=beta,
        denominator=known.sum().clamp(min=1) if denominator is None else denominator,
        weights=weight,
        importance_cap=importance_cap,
    )
    return out.loss, _metrics(out, reward, value.detach(), known, rows)


class _Rows(NamedTuple):
    """States that predict the completion tokens, packed, and how they become logits."""

    hidden: Tensor  # [T, H]
    head: nn.Linear
    family: Family
    mask: Tensor  # bool[B, L]
    token_ids: Tensor  # i64[T]

    @property
    def bias(self) -> Tensor | None:
        return self.head.bias

    def pack(self, values: Tensor) -> Tensor:  # [B, L] -> [T]
        return packed(values, self.mask)

    def pad(self, values: Tensor) -> Tensor:  # [T] -> [B, L]
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask, values)

    def _linear(self, temperature: float) -> dict[str, Any]:
        return linear_options(self.bias, temperature / self.family.scale)

    def logprobs(self, temperature: float) -> Tensor:
        """Log-probs f32[T] of the completion tokens, differentiable."""
        weight = self.head.weight
        if self.family.cap is None:
            return linear_logprobs(self.hidden, weight, self.token_ids, **self._linear(temperature))
        scale = self.family.scale
        bias = None if self.bias is None else self.bias * scale
        hidden, cap = self.hidden * scale, self.family.cap
        return capped_logprobs(hidden, weight, self.token_ids, bias=bias, cap=cap, temperature=temperature)

    def balance(self, *, old_logprobs: Tensor | None, temperature: float, **terms: Any) -> Balance:
        """The loss; fused, unless the model bounds its logits."""
        places = offsets(self.mask)
        if self.family.cap is not None:
            return loss_from_logprobs(self.logprobs(temperature), cu_seqlens=places, old_logprobs=old_logprobs, **terms)
        head = self.head.weight
        linear = self._linear(temperature)
        return loss_from_hidden(self.hidden, head, self.token_ids, places, old_logprobs=old_logprobs, **linear, **terms)


def _rows(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> _Rows:
    """Run the model up to its output layer, and pack the states that predict completion tokens."""
    mask = _checked(input_ids, attention_mask, completion_mask)
    inner: Any = getattr(model, "module", model)  # of DDP
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
        raise InputError(f"model is a {type(model).__name__}: give a causal language model of transformers")
    head = output_layer(inner)
    more = {"attention_mask": attention_mask}
    if takes(inner, "position_ids") or takes(getattr(inner, "get_base_model", lambda: inner)(), "position_ids"):
        more["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # padding on the left has no place
    hidden = head_states(inner, input_ids, wrapper=model, **more)
    states = packed(hidden[:, :-1], mask[:, 1:].to(hidden.device)).to(head.weight.dtype)
    return _Rows(states, head, _family(inner), mask, packed(input_ids, mask))


def _family(model: Any) -> Family:
    """How the model's logits follow from its output layer; tried on a few tokens where its type alone does not tell."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    if is_plain(model.config):
        return examine(model)
    was_training = model.training
    model.eval()  # dropout would make two passes differ
    try:
        return examine(model)
    finally:
        cast(nn.Module, model).train(was_training)


def _checked(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Return `completion_mask` as booleans. Raises InputError if it does not fit the other two."""
    if input_ids.ndim != 2:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}: give one padded row per completion, [B, L]")
    for name, mask in (("attention_mask", attention_mask), ("completion_mask", completion_mask)):
        if mask.shape != input_ids.shape:
            missing = input_ids.shape[1] - mask.shape[-1]
            pad = f": torch.nn.functional.pad({name}, ({missing}, 0)) if it has the last columns" if missing > 0 else ""
            raise InputError(
                f"{name} has shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}: give one number per "
                f"token of input_ids{pad}"
            )
    mask, seen = completion_mask.bool(), attention_mask.bool()
    before = torch.nn.functional.pad(seen[:, :-1], (1, 0))
    wrong = torch.stack([(mask & ~seen).any(1), (mask & ~before).any(1)]).cpu()
    if bool(wrong[0].any()):
        row = int(wrong[0].nonzero()[0, 0])
        raise InputError(f"completion_mask is 1 on padding in row {row}: multiply it by attention_mask")
    if bool(wrong[1].any()):
        row = int(wrong[1].nonzero()[0, 0])
        raise InputError(
            f"completion_mask is 1 on the first token of row {row}, which no state predicts: put the prompt, or a "
            "beginning-of-text token, before it"
        )
    return mask


def _per_row(name: str, values: Tensor | Sequence[float], count: int, device: torch.device) -> Tensor:
    """Return f32[B]; gradients of a tensor are kept."""
    row = values if isinstance(values, Tensor) else torch.tensor([torch.nan if v is None else v for v in values])
    if row.shape != (count,):
        raise InputError(
            f"{name} has shape {tuple(row.shape)}, and input_ids has {count} rows: give one number per row, [{count}]"
        )
    return row.to(device=device, dtype=torch.float32)


def _names(groups: Sequence[Hashable] | Tensor | None, group_size: int | None, count: int) -> list[Hashable]:
    """Return the name of each row's group."""
    if groups is not None:
        return groups.tolist() if isinstance(groups, Tensor) else list(groups)
    assert group_size is not None
    if group_size < 2 or count % group_size:
        raise InputError(
            f"group_size is {group_size} for {count} rows: give whole groups of two completions or more of a prompt, "
            "in consecutive rows, or give groups"
        )
    return [i // group_size for i in range(count)]


def _aligned(logprobs: Tensor, input_ids: Tensor) -> Tensor:
    """Return [B, L], constant."""
    rows, length = input_ids.shape
    if logprobs.shape == (rows, length - 1):
        logprobs = torch.nn.functional.pad(logprobs, (1, 0))
    if logprobs.shape != (rows, length):
        raise InputError(
            f"old_logprobs has shape {tuple(logprobs.shape)} and input_ids {(rows, length)}: give what "
            "completion_logprobs returns for the same batch"
        )
    return logprobs.detach().float()


def _metrics(out: Balance, rewards: Tensor, values: Tensor, known: Tensor, rows: _Rows) -> Metrics:
    count = known.sum().clamp(min=1)

    def mean(row: Tensor) -> Tensor:
        return torch.where(known, row.float(), 0.0).sum() / count

    found = {
        "reward": mean(rewards),
        "value": mean(values),
        "residual_rms": mean(out.residual.square()).sqrt(),
        "log_ratio": mean(out.log_ratio),
        "importance_weight": mean(out.weight),
        "tokens": rows.mask.sum() / len(rows.mask),
    }
    if out.entropy is not None:
        found["entropy"] = out.entropy.sum() / max(len(out.entropy), 1)
    return found
