"""Prioritised sampler over integer weights, with its state on one device and without host synchronisation.

Weights are fixed point (2^27 = 1.0) and sums are int64, so addition is exact: sums do not drift, a leaf of weight 0 is
never drawn, and every device and rank draws the same indices. Randomness is a function of (seed, stream, step).

N = capacity, B = elements per call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._backend import require_kernels, resolve_backend
from ._tree import arithmetic as tree_reference
from ._tree.arithmetic import DISTINCT_METHODS, MAX_SEQUENCE, MODES, ONE, STATUS_FIELDS, WEIGHT_BITS, WEIGHT_MASK, Bell
from ._tree.host import IS_BUILT, HostTree, leaves

__all__ = ["Bell", "PriorityTree", "Sample"]

MAX_CAPACITY = 2**31
_WEIGHT_DTYPES = (*_checks.FLOAT_DTYPES, *_checks.INTEGER_DTYPES)
_STATE_NAMES = ("step", "seed", "stream", "size", "status_counts")


class Sample(NamedTuple):
    """One draw of B leaves."""

    idx: Tensor  # [B] i64, leaf indices; -1 where nothing could be drawn
    q: Tensor  # [B] i64, fixed-point weights of those leaves, 2^27 = 1.0
    prob: Tensor  # [B] f32, q / total: the probability of the leaf in a single draw
    total: Tensor  # [] i64, sum of all q


class PriorityTree:
    """Weights in [0, 1] for N leaves, drawn in proportion to their weight.

    All state is in tensors whose addresses never change. `size` (i64 [1], initially N; fill it in place) is the length
    of the live prefix: when every weight is 0, draws are uniform over the first `size` leaves and counted in the status
    as `empty`; if `size` is 0 too, every index is -1. Use a tree from a single CUDA stream. Two trees with the same
    seed need different `stream` numbers to draw independently.

    Args:
        capacity: N, from 1 to 2^31; it cannot grow.
        seed: key of the random numbers, from 0 to 2^64 - 1.
        device: device of the state.
        stream: number from 0 to 2^32 - 1 that separates trees with the same seed.
        backend: "auto" is "triton" on CUDA, compiled code on a CPU, and "reference" (plain PyTorch, O(N) per draw)
            elsewhere and where the package was built without a C compiler. All give identical bits.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        capacity: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        stream: int = 0,
        backend: str = "auto",
    ) -> None:
        for name, value, low, high in (
            ("capacity", capacity, 1, MAX_CAPACITY),
            ("seed", seed, 0, 2**64 - 1),
            ("stream", stream, 0, 2**32 - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be an int from {low} to {high}, got {value!r}")
        self.capacity = capacity
        is_compiled = IS_BUILT and backend == "auto" and torch.device(device).type == "cpu"
        # (sequence << 28) | q; q alone where the code is compiled.
        self.leaf = leaves(capacity) if is_compiled else torch.zeros(capacity, dtype=torch.int64, device=device)
        self.sequence = torch.zeros(1, dtype=torch.int64, device=device)  # element updates since the last rebuild
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # draws so far
        signed_seed = seed - 2**64 if seed >= 2**63 else seed
        self.seed = torch.tensor([signed_seed], dtype=torch.int64, device=device)
        self.stream = torch.tensor([stream], dtype=torch.int64, device=device)
        self.size = torch.tensor([capacity], dtype=torch.int64, device=device)
        self.status_counts = torch.zeros(len(STATUS_FIELDS), dtype=torch.int64, device=device)
        # Upper bound of `sequence`, known to the host without reading the device.
        self._host_sequence = 0
        self.backend = "reference"
        """What writes and draws here: "triton", "compiled" or "reference"."""
        self._kernels = None
        self._host: HostTree | None = None
        if resolve_backend(backend, self.leaf) == "triton":
            require_kernels("the tree", self.leaf)
            from ._tree.launches import TritonTree

            self.backend, self._kernels = "triton", TritonTree(self.leaf)
        elif is_compiled:
            self.backend = "compiled"
            self._host = HostTree(self.leaf, (self.seed, self.stream, self.step), self.size, self.status_counts)

    @property
    def device(self) -> torch.device:
        """Device that holds leaves and sums."""
        return self.leaf.device

    def update(self, idx: Tensor, w: Tensor) -> None:
        """Set the weights of some leaves; among duplicate indices, the last one in the call wins.

        In torch, for one element: ``q[idx] = max(1, round(w * 2**27)) if w > 0 else 0``. NaN and negative weights count
        as 0 and weights above 1 as 1; each is counted in the status. An index outside [0, N) is ignored and counted;
        an index of -1 is padding, ignored and not counted.

        Args:
            idx: [B] int64 or int32 on the device of the tree.
            w: [B] floating point in [0, 1], or int32 / int64 already quantised (2^27 = 1.0).

        Raises:
            ValueError: a shape, dtype or device is wrong.
        """
        _checks.check_tensor("idx", idx, 1, _checks.INTEGER_DTYPES)
        self._check_weights("w", w)
        if idx.shape != w.shape:
            raise ValueError(f"idx and w disagree on B: {idx.shape[0]} vs {w.shape[0]}")
        _checks.check_same_device("idx", idx, "the tree", self.leaf)
        self._write(idx, w)

    def write_range(self, start: int | Tensor, w: Tensor) -> None:
        """Set consecutive leaves from `start`, wrapping around at the end of the tree, as in a ring buffer.

        In torch: ``q[(start + torch.arange(B)) % N] = quantised w``; invalid weights are handled as in `update`.

        Args:
            start: first leaf, an int or a 0-d or 1-element integer tensor on the device of the tree.
            w: [B] weights, B <= N, as in `update`.

        Raises:
            ValueError: a shape, dtype or device is wrong, or B > N.
        """
        self._check_weights("w", w)
        if w.shape[0] > self.capacity:
            raise ValueError(f"w has more elements than the tree has leaves: {w.shape[0]} vs {self.capacity}")
        if not isinstance(start, Tensor):
            start = torch.full((), start, dtype=torch.int64, device=self.device)
        else:
            if start.numel() != 1 or start.dtype not in _checks.INTEGER_DTYPES:
                raise ValueError(f"start must be one integer, got {start.dtype} of shape {tuple(start.shape)}")
            _checks.check_same_device("start", start, "the tree", self.leaf)
        self._write(start.reshape(()), w)

    @torch.no_grad()
    def rebuild(
        self,
        w: Tensor | Bell | Callable[[Tensor], Tensor],
        stats: Tensor | None = None,
        *,
        allowed: Tensor | None = None,
    ) -> None:
        """Set every leaf and every sum at once; with a `Bell`, the weights are computed in the same pass.

        Args:
            w: [N] weights as in `update`, a `Bell`, or a function that turns `stats` into weights.
            stats: [N] floating-point statistics for the bell, or the argument of the function.
            allowed: [N] bool; where it is False the weight is 0 and an invalid value is not counted.

        Raises:
            ValueError: the weights are not [N], a dtype or device is wrong, or `stats` does not fit `w`.
        """
        if isinstance(w, Tensor):
            if stats is not None:
                raise ValueError("stats must be None when w is a tensor")
            source = w
        else:
            if stats is None:
                raise ValueError("stats must be given when w is a function, got None")
            source = stats if isinstance(w, Bell) else w(stats)
        bell = w if isinstance(w, Bell) else None
        if bell is None:
            self._check_weights("w", source)
        else:
            _checks.check_tensor("stats", source, 1, _checks.FLOAT_DTYPES)
            _checks.check_same_device("stats", source, "the tree", self.leaf)
        self._check_length("w" if bell is None else "stats", source)
        if allowed is not None:
            _checks.check_tensor("allowed", allowed, 1, (torch.bool,))
            _checks.check_same_device("allowed", allowed, "the tree", self.leaf)
            self._check_length("allowed", allowed)
        if self._kernels is not None:
            contiguous = None if allowed is None else allowed.contiguous()
            self._kernels.rebuild(source.detach().contiguous(), self.status_counts, bell=bell, allowed=contiguous)
        elif self._host is not None:
            self._host.rebuild(source, bell, allowed)
        else:
            weights = source if bell is None else bell(source)
            q, counts = tree_reference.quantise(weights if allowed is None else torch.where(allowed, weights, 0))
            self.leaf.copy_(q)
            self.status_counts[:3] += counts
        self.sequence.zero_()
        self._host_sequence = 0

    def sample(self, B: int, mode: str = "systematic") -> Sample:
        """Draw B leaves with probability q / total each, and advance the step.

        systematic: one random offset and a fixed stride; a leaf gets floor or ceil of B q / total copies, so all are
        distinct when B * q.max() <= total (otherwise the status counts repeats). Two neighbouring leaves may never be
        drawn together. stratified: one draw in each of B equal parts of the total. iid: independent draws.
        In torch: ``idx = searchsorted(cumsum(q), target, right=True)`` with the integer targets of `draw_targets`.

        Args:
            B: number of draws, 0 or more.
            mode: "systematic", "stratified" or "iid".

        Returns:
            Sample(idx i64[B], q i64[B], prob f32[B], total i64[]); idx ascends for systematic and stratified. When
            the total is 0, q and total are 0 and prob is 1 / size.

        Raises:
            ValueError: B is negative or the mode is unknown.
        """
        self._check_draws(B)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if self._kernels is not None:
            return Sample(*self._kernels.sample(B, mode, self._counters(), self.status_counts))
        if self._host is not None:
            return Sample(*self._host.sample(B, mode))
        idx, total = self._draw(B, mode)
        if mode == "systematic":
            repeats = (idx[1:] == idx[:-1]) & (idx[1:] >= 0)
            self.status_counts[STATUS_FIELDS.index("repeats")] += repeats.sum()
        return self._finish_sample(idx, total)

    def sample_distinct(self, B: int, method: str = "first", *, exploration: float = 0.0) -> Sample:
        """Draw B different leaves by successive sampling without replacement, and advance the step.

        first: the first B distinct values of 1.5 B + 32 iid draws; cheap while B is well below the number of leaves
        that hold most of the weight. race: the B smallest of Exp(1) / q over all leaves; always finds B if there are B
        leaves of positive probability. Both have exactly the distribution of drawing one leaf at a time,
        without replacement.

        A race can mix in even draws: it draws from p = (1 - exploration) q / sum q + exploration / L over the L leaves
        of positive weight.

        Args:
            B: number of draws, 0 or more.
            method: "first" or "race".
            exploration: share of the even draws in a race, from 0 to 1.

        Returns:
            Sample as in `sample`; `prob` is q / total, not the inclusion probability. If fewer than B leaves are
            found, the rest of idx is -1 with q and prob 0, and the status counts the call as `short`.

        Raises:
            ValueError: B is negative, the method is unknown, or `exploration` is invalid.
        """
        self._check_draws(B)
        if method not in DISTINCT_METHODS:
            raise ValueError(f"method must be one of {DISTINCT_METHODS}, got {method!r}")
        if not 0.0 <= exploration <= 1.0 or (exploration > 0.0 and method != "race"):
            raise ValueError(f"exploration must be from 0 to 1, and 0 unless the method is 'race', got {exploration!r}")
        if self._host is not None:
            return Sample(*self._host.sample_distinct(B, method, exploration))
        if method == "race":
            if self._kernels is not None:
                keys, total = self._kernels.race(self._counters(), self.status_counts, exploration=exploration)
            else:
                effective, total = self._effective_weights()
                keys = tree_reference.race_keys(effective, **self._random_state(), exploration=exploration)
            idx = tree_reference.race_winners(keys, B)
        else:
            num_candidates = B + B // 2 + 32
            if self._kernels is not None:
                candidates, _, _, total = self._kernels.sample(
                    num_candidates, "iid", self._counters(), self.status_counts
                )
                self.step -= 1  # undo: the step is counted below for every method
            else:
                candidates, total = self._draw(num_candidates, "iid")
            idx = tree_reference.first_occurrences(candidates, B)
        self.status_counts[STATUS_FIELDS.index("short")] += (idx < 0).any()
        return self._finish_sample(idx, total)

    def get(self, idx: Tensor) -> Tensor:
        """Return fixed-point weights (i64, shape of `idx`, 2^27 = 1.0); 0 for an index outside [0, N)."""
        is_inside = (idx >= 0) & (idx < self.capacity)
        return torch.where(is_inside, self.leaf[torch.where(is_inside, idx, 0).long()].long() & WEIGHT_MASK, 0)

    def total(self) -> Tensor:
        """Sum of all fixed-point weights, i64 []."""
        summed = self._kernels or self._host
        return (self.leaf & WEIGHT_MASK).sum() if summed is None else summed.total()

    def status(self) -> dict[str, int]:
        """Return counts of corrected inputs and failed draws so far; the only call that waits for the device."""
        return dict(zip(STATUS_FIELDS[:-1], self.status_counts.tolist(), strict=False))

    def check(self) -> Tensor:
        """Return whether all invariants hold, bool []: ranges of weights, sequence numbers, size, and sums."""
        q, sequence = self.leaf & WEIGHT_MASK, self.leaf >> WEIGHT_BITS
        is_sound = (self.leaf >= 0).all() & (q <= ONE).all() & (sequence <= self.sequence).all()
        summed = self._kernels or self._host
        if summed is not None:
            is_sound &= summed.is_sound()
        return is_sound & ((self.size >= 0) & (self.size <= self.capacity)).all()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the state that a resumed run needs for the same draws: weights, step, seed, stream, size."""
        weights = (self.leaf & WEIGHT_MASK).int()
        return {"weights": weights, **{name: getattr(self, name).clone() for name in _STATE_NAMES}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state from `state_dict` in place.

        Raises:
            ValueError: an entry is missing, or the state has another capacity.
        """
        missing = [name for name in ("weights", *_STATE_NAMES) if name not in state]
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}")
        for name, own in (("weights", self.leaf), *((name, getattr(self, name)) for name in _STATE_NAMES)):
            if state[name].shape != own.shape:
                raise ValueError(f"state[{name!r}] has shape {tuple(state[name].shape)}, expected {tuple(own.shape)}")
        self.rebuild(state["weights"].to(self.device))
        for name in _STATE_NAMES:
            getattr(self, name).copy_(state[name])

    def _write(self, idx: Tensor, w: Tensor) -> None:
        """Write leaves `idx` [B], or the range that starts at a 0-d `idx`."""
        if self._host is not None:
            self._host.update(idx, w)
            return
        num_elements = w.shape[0]
        if w.requires_grad:
            w = w.detach()
        if self._host_sequence + num_elements > MAX_SEQUENCE:
            self.leaf.bitwise_and_(WEIGHT_MASK)
            self.sequence.zero_()
            self._host_sequence = 0
        self._host_sequence += num_elements
        if self._kernels is not None:
            self._kernels.update(idx.contiguous(), w.contiguous(), self.sequence, self.status_counts)
            return
        positions = torch.arange(num_elements, device=self.device)
        idx = (positions + idx.long()) % self.capacity if idx.ndim == 0 else idx.long()
        is_inside = (idx >= 0) & (idx < self.capacity)
        self.status_counts[STATUS_FIELDS.index("out_of_range")] += (~is_inside & (idx != -1)).sum()
        q, counts = tree_reference.quantise(torch.where(is_inside, w, 0))  # unwritten values are not counted
        self.status_counts[:3] += counts
        # For ignored elements: a code of 0 at leaf 0 changes nothing, because every code is at least 0.
        code = torch.where(is_inside, ((positions + 1 + self.sequence) << WEIGHT_BITS) | q, 0)
        self.leaf.scatter_reduce_(0, torch.where(is_inside, idx, 0), code, "amax")
        self.sequence += num_elements

    def _effective_weights(self) -> tuple[Tensor, Tensor]:
        """Return weights [N] to draw by (the live prefix if all are 0), and their true total []; counts empty draws."""
        q = self.leaf & WEIGHT_MASK
        total = q.sum()
        is_live = torch.arange(self.capacity, device=self.device) < self.size
        self.status_counts[STATUS_FIELDS.index("empty")] += total == 0
        return torch.where(total == 0, is_live.long(), q), total

    def _draw(self, num_draws: int, mode: str) -> tuple[Tensor, Tensor]:
        """Draw with the reference: return indices [B] (-1 if there is nothing to draw) and the total []."""
        effective, total = self._effective_weights()
        effective_total = effective.sum()
        targets = tree_reference.draw_targets(mode, num_draws, effective_total, **self._random_state())
        return torch.where(effective_total > 0, tree_reference.select(effective, targets), -1), total

    def _finish_sample(self, idx: Tensor, total: Tensor) -> Sample:
        self.step += 1
        q = torch.where(idx >= 0, self.get(idx), 0)
        weight = torch.where(total == 0, 1, q).double() / torch.where(total == 0, self.size, total).clamp(min=1)
        return Sample(idx=idx, q=q, prob=torch.where(idx >= 0, weight, 0.0).float(), total=total)

    def _counters(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("seed", "stream", "step", "size")}

    def _random_state(self) -> dict[str, Tensor]:
        return {"seed": self.seed, "stream": self.stream, "step": self.step}

    def _check_weights(self, name: str, w: Tensor) -> None:
        _checks.check_tensor(name, w, 1, _WEIGHT_DTYPES)
        _checks.check_same_device(name, w, "the tree", self.leaf)

    def _check_length(self, name: str, tensor: Tensor) -> None:
        if tensor.shape[0] != self.capacity:
            raise ValueError(f"{name} and the tree disagree on N: {tensor.shape[0]} vs {self.capacity}")

    def _check_draws(self, num_draws: int) -> None:
        if isinstance(num_draws, bool) or not isinstance(num_draws, int) or not 0 <= num_draws < 2**31:
            raise ValueError(f"B must be an int from 0 to 2**31 - 1, got {num_draws!r}")
