"""Log-probs without gradients on a CPU: tiles of logits that stay in the cache, each read once and thrown away.

Logits of a tile are multiplied into one small buffer, so memory sees neither them nor their exponentials. Of the rows'
statistics only these are kept, updated tile by tile, with M the largest logit so far of those that are not the target:

    others = sum over v != y of exp(z_v - M)        weighted = sum of the same terms times (z_v - M)

The target's logit stays outside, so that the log-prob of a target near 1 keeps its relative accuracy.

T = rows, H = hidden size, V = vocabulary of this rank.
"""

import torch
from torch import Tensor

from .head import Head
from .products import TorchProducts

# A tile of 512 rows and 1024 columns of float32 takes 2 MiB; narrower ones multiply more slowly.
TILE_ROWS = 512
TILE_COLUMNS = 1024
# Where exp() is 0 in every dtype; the clamp keeps 0 * -inf out of sums.
LOWEST_SHIFTED_LOGIT = -1e4


def score_by_columns(
    head: Head,
    products: TorchProducts,
    hidden: Tensor,  # [T, H]
    token_ids: Tensor,  # [T]
    *,
    with_entropy: bool,
    workspace_bytes: int,
    buffer: Tensor | None = None,  # memory for tiles, of any shape; None takes some of the workspace
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log-probs, log-sum-exps and entropies (None if not asked for), all [T]; 2 T H V operations."""
    sums = _Sums(head, token_ids, with_entropy=with_entropy)
    element = head.accumulate.itemsize
    rows_at_once = max(1, workspace_bytes // (4 * hidden.shape[1] * element))
    for first in range(0, hidden.shape[0], rows_at_once):
        part = slice(first, min(first + rows_at_once, hidden.shape[0]))
        _add_tiles(sums, products, products.states(hidden[part]), first, workspace_bytes, buffer)
    return sums.finish(head)


def _add_tiles(
    sums: "_Sums", products: TorchProducts, states: Tensor, first: int, workspace_bytes: int, buffer: Tensor | None
) -> None:
    """Add the logits of rows first.. with `states` [R, H] to the sums, over the columns and then the rows."""
    head = products.head
    num_tokens = head.weight.shape[0]
    # An entropy takes a second tile for a moment, which stays a small part of the workspace.
    most = workspace_bytes // ((8 if sums.weighted is not None else 2) * head.accumulate.itemsize)
    if buffer is not None and buffer.numel() == 0:  # of a group of empty sequences
        buffer = None
    if buffer is not None:
        buffer = buffer.view(-1)
        most = min(most, buffer.shape[0])
    width = max(1, min(TILE_COLUMNS, num_tokens, most))
    height = max(1, min(TILE_ROWS, states.shape[0], most // width))
    if buffer is None:
        buffer = torch.empty(height * width, dtype=head.accumulate, device=states.device)
    width = max(1, min(width, products.converted_rows(workspace_bytes // 4)))
    for start in range(0, num_tokens, width):
        columns = slice(start, min(start + width, num_tokens))
        block = products.weight(columns)
        bias = None if head.bias is None else head.bias[columns]
        for top in range(0, states.shape[0], height):
            rows = states[top : top + height]
            tile = buffer[: rows.shape[0] * block.shape[0]].view(rows.shape[0], block.shape[0])
            products.project(rows, block, tile)
            if bias is not None:
                tile.add_(bias)
            sums.add(tile, first + top, start)


class _Sums:
    """Statistics of every row over the columns seen so far."""

    def __init__(self, head: Head, token_ids: Tensor, *, with_entropy: bool) -> None:
        self.target, self.is_owned = head.owned_targets(token_ids)  # [T], [T]
        zeros = torch.zeros(token_ids.shape[0], dtype=head.accumulate, device=token_ids.device)
        self.lowest = torch.finfo(head.accumulate).min
        self.top = torch.full_like(zeros, self.lowest)  # M; nothing seen so far has a logit above it
        self.others = zeros
        self.target_logit = zeros.clone()
        self.weighted = zeros.clone() if with_entropy else None

    def add(self, tile: Tensor, first_row: int, first_column: int) -> None:
        """Take in a tile of logits, which it overwrites."""
        rows = slice(first_row, first_row + tile.shape[0])
        local = self.target[rows] - first_column
        is_inside = ((local >= 0) & (local < tile.shape[1]) & self.is_owned[rows])[:, None]
        place = local.clamp(0, tile.shape[1] - 1)[:, None]
        picked = tile.gather(1, place)
        target_logit = self.target_logit[rows]
        target_logit.copy_(torch.where(is_inside, picked, target_logit[:, None])[:, 0])
        tile.scatter_(1, place, torch.where(is_inside, -torch.inf, picked))
        old = self.top[rows]
        top = torch.maximum(old, tile.amax(dim=1))
        shift = old - top
        factor = shift.exp()
        tile.sub_(top[:, None])
        others = self.others[rows]
        if self.weighted is not None:
            products = tile.clamp(min=LOWEST_SHIFTED_LOGIT)
            products.mul_(tile.exp_())
            weighted = self.weighted[rows]
            weighted.add_(others * shift.clamp_(min=LOWEST_SHIFTED_LOGIT)).mul_(factor).add_(products.sum(dim=1))
        else:
            tile.exp_()
        others.mul_(factor).add_(tile.sum(dim=1))
        self.top[rows] = top

    def finish(self, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add up the ranks of a split vocabulary; return log-probs, log-sum-exps and entropies."""
        if head.group is not None:
            top = head.max_over_ranks(self.top.clone())
            self._move_to(top)
            for values in (self.others, self.target_logit, *(() if self.weighted is None else (self.weighted,))):
                head.sum_over_ranks(values)
        largest = torch.maximum(self.top, self.target_logit)
        self._move_to(largest)
        target_shifted = self.target_logit - largest
        target_exponential = target_shifted.exp()
        total = self.others + target_exponential
        # log1p keeps the relative accuracy of a log-prob near 0.
        log_total = torch.where(target_shifted == 0, torch.log1p(self.others), torch.log(total))
        entropy = None
        if self.weighted is not None:
            at_target = target_exponential * target_shifted.clamp(min=LOWEST_SHIFTED_LOGIT)
            entropy = log_total - (self.weighted + at_target) / total
        return target_shifted - log_total, largest + log_total, entropy

    def _move_to(self, top: Tensor) -> None:
        """Express the sums with another M [T], at least as large as the present one."""
        shift = self.top - top
        factor = shift.exp()
        if self.weighted is not None:
            self.weighted.add_(self.others * shift.clamp(min=LOWEST_SHIFTED_LOGIT)).mul_(factor)
        self.others.mul_(factor)
        self.top = top
