"""The tree's writes, sums and draws on a CPU, compiled from `host_code`: the bits of `arithmetic`, `exact` and `bits`.

Where the package was built without a C compiler, `IS_BUILT` is False and trees are plain PyTorch.

N = capacity, B = elements per call.
"""

from typing import Any

import torch
from torch import Tensor

from .arithmetic import DISTINCT_METHODS, Bell


def _built() -> Any:
    try:
        from . import _host  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return None
    return _host


compiled = _built()
IS_BUILT = compiled is not None

# As `host_code` numbers them.
_KINDS = {torch.float32: 0, torch.float64: 1, torch.int32: 2, torch.int64: 3}
_MODES = {"iid": 0, "stratified": 1, "systematic": 2}

# Leaves of a row, as in `host_code`, which reads whole rows.
_ROW = 16

Sampled = tuple[Tensor, Tensor, Tensor, Tensor]


def leaves(capacity: int) -> Tensor:
    """Return i32[N] of zeros, with memory of zeros to the end of the last row."""
    return torch.zeros(-(-capacity // _ROW) * _ROW, dtype=torch.int32)[:capacity]


class HostTree:
    """Sums of the leaves i32[N], beside the tensors of a `PriorityTree` that its calls read and write.

    A leaf holds its weight alone: without threads the last write to it is the last.
    """

    def __init__(self, leaf: Tensor, random_state: tuple[Tensor, Tensor, Tensor], size: Tensor, status: Tensor) -> None:
        """Make the sums of `leaves` that are all 0; `random_state` is seed, stream and step."""
        self.leaf, self.size, self.status = leaf, size, status
        self.random_state = random_state
        # The number of leaves above 0, and levels of sums up to the total.
        self.sums = torch.zeros(compiled.room(leaf.shape[0]), dtype=torch.int64)

    def nbytes(self) -> int:
        """Return the bytes of the sums."""
        return self.sums.nbytes

    def update(self, idx: Tensor, w: Tensor) -> None:
        """Write leaves idx [B], or the range from a 0-d `idx` on, round the end."""
        w, kind = _readable(w)
        if idx.ndim == 0:
            place = (0, 0, int(idx) % self.leaf.shape[0])
        else:
            idx = idx.contiguous()
            place = (idx.data_ptr(), _KINDS[idx.dtype], 0)
        compiled.update(*self._tree(), *place, w.data_ptr(), kind, w.shape[0], self.status.data_ptr())

    def rebuild(self, source: Tensor, bell: Bell | None, allowed: Tensor | None) -> None:
        """Write every leaf: weights [N], or a bell of statistics [N]; 0 where not `allowed`, bool[N]."""
        source, kind = _readable(source)
        allowed = None if allowed is None else allowed.contiguous()
        shape = (0, 0.0, 1.0) if bell is None else (1, float(bell.center), float(bell.width))
        mask = 0 if allowed is None else allowed.data_ptr()
        compiled.rebuild(*self._tree(), source.data_ptr(), kind, *shape, mask, self.status.data_ptr())

    def sample(self, num_draws: int, mode: str) -> Sampled:
        """Return idx i64[B], q i64[B], prob f32[B] and total i64[], and advance the step."""
        drawn = _room_for(num_draws)
        compiled.sample(*self._tree(), _MODES[mode], num_draws, *self._state(), *_addresses(drawn))
        return drawn

    def sample_distinct(self, num_draws: int, method: str, exploration: float) -> Sampled:
        """Return what `sample` does, of distinct leaves, by one of `DISTINCT_METHODS`."""
        drawn = _room_for(num_draws)
        is_race = DISTINCT_METHODS.index(method)
        compiled.sample_distinct(
            *self._tree(), is_race, float(exploration), num_draws, *self._state(), *_addresses(drawn)
        )
        return drawn

    def total(self) -> Tensor:
        """Return the sum of all leaves, i64 []."""
        return self.sums[-1].clone()

    def is_sound(self) -> bool:
        """Return whether the sums are those of the leaves."""
        return compiled.is_sound(*self._tree())

    def _tree(self) -> tuple[int, int, int]:
        return self.leaf.data_ptr(), self.sums.data_ptr(), self.leaf.shape[0]

    def _state(self) -> tuple[int, ...]:
        seed, stream, step = self.random_state
        return seed.data_ptr(), stream.data_ptr(), step.data_ptr(), self.size.data_ptr(), self.status.data_ptr()


def _readable(values: Tensor) -> tuple[Tensor, int]:
    """Return values in a data type and order that `host_code` reads, and its number of that type."""
    kind = _KINDS.get(values.dtype)
    if kind is None:
        return values.detach().float().contiguous(), 0
    return values.detach().contiguous() if not values.is_contiguous() else values, kind


def _room_for(num_draws: int) -> Sampled:
    idx, q = torch.empty(num_draws, dtype=torch.int64), torch.empty(num_draws, dtype=torch.int64)
    return idx, q, torch.empty(num_draws, dtype=torch.float32), torch.empty((), dtype=torch.int64)


def _addresses(drawn: Sampled) -> tuple[int, ...]:
    idx, q, prob, total = drawn
    return idx.data_ptr(), q.data_ptr(), prob.data_ptr(), total.data_ptr()
