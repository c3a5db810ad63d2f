"""Choice of what the products for dhidden and dweight leave out, within a bound on what that changes.

Peaked policies put nearly all of a row of E' into few tokens, and the other columns add less to the gradients than
rounding E' would. With x_tv = |dloss / dz_tv| = |scale_t E'_tv| and g_t = |c_t| (1 - p_y), which is x at the target and
the sum of x over all other tokens, a choice leaves out d_t, a sum of entries x_tv, of row t. For every tile of rows

    sum_t d_t <= share * sum_t g_t        and        sum_t d_t^2 <= share^2 * sum_t g_t^2

The second holds dhidden and the first dweight: whatever the directions of the vectors that are added up, a sum is at
most the sum of their sizes. With M = max ||W_v||, N = max ||h_t|| and Frobenius norms

    ||error of dhidden|| <= share M / temperature ||g||_2        ||error of dweight|| <= share N / temperature ||g||_1

Entries are added up and not compared one by one, so many small ones count as what they are together. Rounding E' to a
type of unit roundoff u can change as much as a share of 2 u, because x adds up to 2 g_t in a row.

Rows of a weight have a large mean in common, and what dhidden lacks is mostly a multiple of it. The sum of what is left
out of a row, times the mean of those rows of the weight, therefore stands in for it: the error of dhidden is then
several times smaller, and M the largest distance from that mean, at most 2 max ||W_v||.

T = packed tokens, H = hidden size, V = vocabulary of this rank, R = rows of a chunk, r = rows of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a tile on a CPU: more share fewer columns, fewer make smaller products and add to dweight more often.
TILE_ROWS = 768
# With more columns than this share, gathering them costs more than multiplying all.
MOST_GATHERED = 0.75
# How often a choice may be reduced until both sums are within their bounds; then all columns are kept.
ATTEMPTS = 4


class Kept(NamedTuple):
    """Columns that the products of a tile of rows take, and what stands for the others in dhidden."""

    rows: slice  # of the chunk
    columns: Tensor | None  # [K] ascending; None = all, and the rest does not count
    left_out: Tensor  # [r], sums of E' over the other columns
    stand_in: Tensor  # [V], shares of the other columns in the mean row of the weight that is multiplied by them


def gradient_masses(scale: Tensor, factor: Tensor, logprobs: Tensor) -> Tensor:
    """Return g [R] float64, |c_t| (1 - p_y); `scale` is -c times `factor`, which makes probabilities of E'.

    Rows that do not count may hold anything.
    """
    masses = (scale.double() / factor.double()).abs() * -torch.expm1(logprobs.double())
    return torch.where(scale == 0, 0.0, masses)


def choose_columns(
    matrix: Tensor,  # [r, V], E'
    scale: Tensor,  # [r], dloss / dz = scale E'
    masses: Tensor,  # [r] f64, g
    target: Tensor,  # [r], column of the token, any if another rank has it
    is_owned: Tensor,  # [r] bool
    share: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the last three fields of `Kept` for rows on a CPU.

    Columns are left out in the order of their sum of x over the tile. What is not finite is never left out: every
    comparison with NaN is false.
    """
    largest = scale.abs().amax().clamp(min=torch.finfo(scale.dtype).tiny)  # squares of tiny numbers would be 0
    weights, masses = scale.abs() / largest, masses / largest.double()
    at_target = matrix.gather(1, target[:, None]).squeeze(1)
    # Only the target's entry is negative. It counts by its size: twice it has to be added to a sum of all entries.
    flipped = torch.where(is_owned, -2.0 * at_target.clamp(max=0.0), 0.0)
    column_sums = torch.mv(matrix.T, weights).index_add_(0, target, weights * flipped)
    ordered, order = column_sums.sort()
    together = ordered.double().cumsum(0)
    budget, limit = share * masses.sum(), share * torch.linalg.vector_norm(masses)
    for _ in range(ATTEMPTS):
        count = int(torch.searchsorted(together, budget, right=True))
        if not bool(budget < torch.inf) or count < (1.0 - MOST_GATHERED) * order.shape[0]:
            break
        is_out = torch.zeros_like(column_sums).index_fill_(0, order[:count], 1.0)
        left_out = torch.mv(matrix, is_out)
        norm = torch.linalg.vector_norm((weights * (left_out + flipped * is_out[target])).double())
        if bool(norm <= limit):
            stand_in = column_sums.mul_(is_out)
            stand_in /= stand_in.sum().clamp(min=torch.finfo(stand_in.dtype).tiny)
            return order[count:].sort().values, left_out, stand_in
        budget = budget * torch.clamp(0.95 * limit / norm, max=0.85)
    return None, column_sums, column_sums
