"""Weighted samplers, ours and those of other projects, behind one interface.

A peer that cannot run here raises UnavailableError with the reason. Times of a host sampler used from a GPU include the
copies, as in training.

N = leaves, B = elements per call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss.methods import UnavailableError
from paced_kernels import Bell, PriorityTree

MODES = ("iid", "stratified", "systematic")
OURS, OUR_RESCAN = "ours", "ours, flat rescan"
ONE = 2**27
CPU = torch.device("cpu")
# Centre and width of the bell that turns estimates into weights; share of draws that ignore the weights.
CENTER, WIDTH, EXPLORATION = 0.5, 0.1, 0.1

Maker = Callable[[int, torch.device, int], "Peer"]
"""Function (capacity N, device of inputs and results, seed) -> peer."""


class Peer:
    """Sampler over weights of N leaves in [0, 1]; all inputs and results are on the device `faces`."""

    modes: tuple[str, ...] = MODES
    has_distinct = False
    home = CPU
    """Device that does the work."""

    def __init__(self, capacity: int, faces: torch.device, seed: int) -> None:
        self.capacity, self.faces, self.seed = capacity, faces, seed

    def rebuild(self, w: Tensor) -> None:
        """Set all weights, w f32 [N]."""
        raise NotImplementedError

    def rebuild_from_values(self, values: Tensor) -> None:
        """Set all weights to a bell of estimates f32 [N]."""
        self.rebuild(bell(values))

    def schedule(self, values: Tensor, num_draws: int) -> Tensor:
        """Draw distinct leaves i64 [B] by the bell, a share of them uniformly."""
        weights = bell(values)
        mixed = (1 - EXPLORATION) * weights / weights.sum() + EXPLORATION / self.capacity
        self.rebuild(mixed / mixed.max())
        return self.sample_distinct(num_draws)

    def update(self, idx: Tensor, w: Tensor) -> None:
        """Set the weights w f32 [B] of leaves idx i64 [B]."""
        raise NotImplementedError

    def write_range(self, start: Tensor, w: Tensor) -> None:
        """Set consecutive weights w f32 [B] from start i64 [], wrapping around at the end."""
        self.update((start + torch.arange(w.shape[0], device=w.device)) % self.capacity, w)

    def sample(self, num_draws: int, mode: str) -> Tensor:
        """Draw leaves i64 [B]."""
        raise NotImplementedError

    def sample_distinct(self, num_draws: int) -> Tensor:
        """Draw distinct leaves i64 [B]."""
        raise NotImplementedError

    def leaves(self) -> Tensor:
        """Return the stored weights, f64 [N] on the CPU."""
        raise NotImplementedError

    def total(self) -> float | None:
        """Return the sum that draws use; None if it is hidden."""
        return None

    def state_bytes(self) -> int | None:
        """Return the memory held between calls; None if it is hidden."""
        return None

    def moved_bytes(self, operation: str, num: int) -> int | None:
        """Return the fewest bytes a call must read and write; None if not counted."""
        del operation, num


def bell(values: Tensor) -> Tensor:
    """Return the weight of an estimate; it is largest at 1/2."""
    return torch.exp(-0.5 * ((values - CENTER) / WIDTH).square())


class Ours(Peer):
    """`PriorityTree` with one backend."""

    has_distinct = True

    def __init__(self, capacity: int, faces: torch.device, seed: int, backend: str) -> None:
        super().__init__(capacity, faces, seed)
        self.home = faces
        self.tree = PriorityTree(capacity, seed=seed, device=faces, backend=backend)

    def rebuild(self, w: Tensor) -> None:
        self.tree.rebuild(w)

    def rebuild_from_values(self, values: Tensor) -> None:
        self.tree.rebuild(Bell(CENTER, WIDTH), values)

    def schedule(self, values: Tensor, num_draws: int) -> Tensor:
        self.tree.rebuild(Bell(CENTER, WIDTH), values)
        return self.tree.sample_distinct(num_draws, "race", exploration=EXPLORATION).idx

    def update(self, idx: Tensor, w: Tensor) -> None:
        self.tree.update(idx, w)

    def write_range(self, start: Tensor, w: Tensor) -> None:
        self.tree.write_range(start, w)

    def sample(self, num_draws: int, mode: str) -> Tensor:
        return self.tree.sample(num_draws, mode).idx

    def sample_distinct(self, num_draws: int) -> Tensor:
        return self.tree.sample_distinct(num_draws, "first" if 8 * num_draws <= self.capacity else "race").idx

    def leaves(self) -> Tensor:
        return self.tree.state_dict()["weights"].cpu().double() / ONE

    def total(self) -> float:
        return self.tree.total().item() / ONE

    def _levels(self) -> list[int]:
        from paced_kernels._tree.launches import level_counts

        return level_counts(self.capacity) if self.tree._kernels is not None else []

    def state_bytes(self) -> int:
        host = self.tree._host
        return self.tree.leaf.nbytes + 8 * sum(self._levels()) + (host.nbytes() if host is not None else 0)

    def moved_bytes(self, operation: str, num: int) -> int | None:
        if self.tree._kernels is None:
            return None
        levels = self._levels()
        write = num * (8 + 4 + 16 + 16 * len(levels))  # index, weight, leaf, and one sum per level, read and written
        draw = num * (256 * (len(levels) + 1) + 20) + 8 * levels[-1]
        rebuild = 12 * self.capacity + 8 * sum(levels)
        counted = {"rebuild": rebuild, "rebuild from values": rebuild, "pair": write + draw}
        counted |= {name: write for name in ("update random", "update duplicates", "update contiguous")}
        return (counted | {f"sample {mode}": draw for mode in MODES}).get(operation)


def unit_targets(num_draws: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return positions in [0, 1) [B] for the draws of a mode, from torch's generator."""
    if mode == "iid":
        return torch.rand(num_draws, device=device, dtype=dtype)
    shift = torch.rand(num_draws if mode == "stratified" else 1, device=device, dtype=dtype)
    return (torch.arange(num_draws, device=device) + shift) / num_draws


class FlatScan(Peer):
    """torch.cumsum over all weights and searchsorted, for every draw."""

    def __init__(self, capacity: int, faces: torch.device, seed: int, dtype: torch.dtype) -> None:
        super().__init__(capacity, faces, seed)
        self.home = faces
        self.weights = torch.zeros(capacity, dtype=dtype, device=faces)
        torch.manual_seed(seed)

    def _stored(self, w: Tensor) -> Tensor:
        return w.to(self.weights.dtype) if self.weights.is_floating_point() else (w.double() * ONE).round().long()

    def rebuild(self, w: Tensor) -> None:
        self.weights.copy_(self._stored(w))

    def update(self, idx: Tensor, w: Tensor) -> None:
        self.weights.index_put_((idx,), self._stored(w))

    def sample(self, num_draws: int, mode: str) -> Tensor:
        cumulative = self.weights.cumsum(0)
        is_float = self.weights.is_floating_point()
        wide = self.weights.dtype if is_float else torch.float64
        targets = unit_targets(num_draws, mode, self.faces, wide) * cumulative[-1]
        targets = targets if is_float else targets.long()
        return torch.searchsorted(cumulative, targets, right=True).clamp_(max=self.capacity - 1)

    def leaves(self) -> Tensor:
        scale = 1 if self.weights.is_floating_point() else ONE
        return self.weights.cpu().double() / scale

    def total(self) -> float | None:
        scale = 1 if self.weights.is_floating_point() else ONE
        return self.weights.cumsum(0)[-1].item() / scale

    def state_bytes(self) -> int:
        return self.weights.nbytes

    def moved_bytes(self, operation: str, num: int) -> int | None:
        size = self.weights.element_size()
        write, draw = num * (12 + size), 2 * size * self.capacity + num * (2 * size + 8)
        counted = {"update random": write, "update duplicates": write, "update contiguous": write}
        counted |= {"pair": write + draw, "rebuild": self.capacity * (4 + size)}
        counted |= {f"sample {mode}": draw for mode in self.modes}
        return counted.get(operation)


class Multinomial(FlatScan):
    """torch.multinomial, with and without replacement."""

    modes = ("iid",)
    has_distinct = True

    def sample(self, num_draws: int, mode: str) -> Tensor:
        del mode
        return torch.multinomial(self.weights, num_draws, replacement=True)

    def sample_distinct(self, num_draws: int) -> Tensor:
        return torch.multinomial(self.weights, num_draws, replacement=False)

    def total(self) -> None:
        return None

    def moved_bytes(self, operation: str, num: int) -> int | None:
        return super().moved_bytes(operation, num) if operation != "distinct" else None


class Numpy(Peer):
    """numpy.cumsum and searchsorted in float64 on the host."""

    has_distinct = True

    def __init__(self, capacity: int, faces: torch.device, seed: int) -> None:
        super().__init__(capacity, faces, seed)
        self.np = importlib.import_module("numpy")
        self.weights = self.np.zeros(capacity)
        self.generator = self.np.random.default_rng(seed)

    def rebuild(self, w: Tensor) -> None:
        self.weights[:] = w.cpu().numpy()

    def update(self, idx: Tensor, w: Tensor) -> None:
        self.weights[idx.cpu().numpy()] = w.cpu().numpy()

    def sample(self, num_draws: int, mode: str) -> Tensor:
        cumulative = self.np.cumsum(self.weights)
        shift = self.generator.random(1 if mode == "systematic" else num_draws)
        unit = shift if mode == "iid" else (self.np.arange(num_draws) + shift) / num_draws
        found = self.np.searchsorted(cumulative, unit * cumulative[-1], side="right")
        return torch.from_numpy(self.np.minimum(found, self.capacity - 1)).to(self.faces)

    def sample_distinct(self, num_draws: int) -> Tensor:
        shares = self.weights / self.weights.sum()
        return torch.from_numpy(self.generator.choice(self.capacity, num_draws, replace=False, p=shares)).to(self.faces)

    def leaves(self) -> Tensor:
        return torch.from_numpy(self.weights.copy())

    def total(self) -> float:
        return float(self.np.cumsum(self.weights)[-1])

    def state_bytes(self) -> int:
        return self.weights.nbytes


class TorchrlTree(Peer):
    """TorchRL's segment tree, sums only, float32, on the CPU or on a GPU."""

    def __init__(self, capacity: int, faces: torch.device, seed: int, home: torch.device) -> None:
        super().__init__(capacity, faces, seed)
        self.home = home
        extension = _torchrl_extension(home)
        cls = extension.CudaSumSegmentTreeFp32 if home.type == "cuda" else extension.SumSegmentTreeFp32
        self.tree: Any = cls(capacity, home) if home.type == "cuda" else cls(capacity)
        self._everything = torch.arange(capacity, device=home)
        torch.manual_seed(seed)

    def rebuild(self, w: Tensor) -> None:
        self.tree[self._everything] = w.to(self.home)

    def update(self, idx: Tensor, w: Tensor) -> None:
        self.tree[idx.to(self.home)] = w.to(self.home)

    def sample(self, num_draws: int, mode: str) -> Tensor:
        unit = unit_targets(num_draws, mode, self.home, torch.float32)
        found = torch.as_tensor(self.tree.scan_lower_bound(unit * self._sum()))
        return found.to(self.faces).clamp_(max=self.capacity - 1)

    def _sum(self) -> Any:
        if self.home.type == "cpu":
            return self.tree.query(0, self.capacity)
        ends = torch.zeros((), dtype=torch.int64, device=self.home), torch.full((), self.capacity, device=self.home)
        return self.tree.query(*ends)

    def leaves(self) -> Tensor:
        return torch.as_tensor(self.tree[self._everything]).cpu().double()

    def total(self) -> float:
        return float(self._sum())

    def state_bytes(self) -> int:
        return 2 * 4 * 2 ** self.capacity.bit_length()


class TorchrlSampler(TorchrlTree):
    """TorchRL's PrioritizedSampler: trees of sums and of minima, importance weights, checks."""

    modes = ("iid",)
    ndim = 1

    def __init__(self, capacity: int, faces: torch.device, seed: int, home: torch.device) -> None:
        super().__init__(1, faces, seed, home)  # raises the reason if unavailable
        self.capacity, self.device = capacity, home
        self._everything = torch.arange(capacity, device=home)
        self.sampler = importlib.import_module("torchrl.data.replay_buffers.samplers").PrioritizedSampler(
            capacity, alpha=1.0, beta=1.0
        )
        if home.type == "cpu":
            importlib.import_module("numpy").random.seed(seed)  # TorchRL draws from the global generator

    def __len__(self) -> int:
        """Return the length of the mock storage."""
        return self.capacity

    def rebuild(self, w: Tensor) -> None:
        self.update(self._everything, w)

    def update(self, idx: Tensor, w: Tensor) -> None:
        if self.home.type == "cuda":
            self.sampler.update_priority(idx, w, storage=self)
        else:
            self.sampler.update_priority(idx.cpu(), w.cpu())
        self.tree = self.sampler._sum_tree

    def sample(self, num_draws: int, mode: str) -> Tensor:
        del mode
        return torch.as_tensor(self.sampler.sample(self, num_draws)[0]).to(self.faces)

    def state_bytes(self) -> int:
        return 2 * super().state_bytes()


def _torchrl_extension(home: torch.device) -> Any:
    try:
        extension = importlib.import_module("torchrl._torchrl")
    except Exception as error:  # an extension built for another torch may fail in any way
        raise UnavailableError(f"torchrl: {type(error).__name__}: {str(error)[:120]}") from None
    name = "CudaSumSegmentTreeFp32" if home.type == "cuda" else "SumSegmentTreeFp32"
    if not hasattr(extension, name):
        raise UnavailableError(f"torchrl was built without {name}")
    return extension


def _our_kernels(capacity: int, faces: torch.device, seed: int) -> Peer:
    from paced_kernels._tree.host import IS_BUILT

    if faces.type == "cpu" and not IS_BUILT:
        raise UnavailableError("the package was built without a C compiler")
    return Ours(capacity, faces, seed, "auto")


def _numpy(capacity: int, faces: torch.device, seed: int) -> Peer:
    try:
        return Numpy(capacity, faces, seed)
    except ImportError as error:
        raise UnavailableError(f"numpy: {error}") from None


def peer_makers(device: torch.device) -> dict[str, Maker]:
    """Return every peer by name, ours first; on a GPU, host peers also with inputs on the host."""
    found: dict[str, Maker] = {OURS: _our_kernels, OUR_RESCAN: functools.partial(Ours, backend="reference")}
    found["torch.multinomial"] = functools.partial(Multinomial, dtype=torch.float32)
    for name, dtype in (("f32", torch.float32), ("f64", torch.float64), ("int64", torch.int64)):
        found[f"torch.cumsum {name}"] = functools.partial(FlatScan, dtype=dtype)
    host: dict[str, Maker] = {
        "numpy": _numpy,
        "TorchRL tree, CPU": functools.partial(TorchrlTree, home=CPU),
        "TorchRL sampler, CPU": functools.partial(TorchrlSampler, home=CPU),
    }
    if device.type != "cuda":
        return found | host
    found["TorchRL tree, CUDA"] = functools.partial(TorchrlTree, home=device)
    found["TorchRL sampler, CUDA"] = functools.partial(TorchrlSampler, home=device)
    return found | host | {f"{name}, host data": functools.partial(_on_host, make) for name, make in host.items()}


def _on_host(make: Maker, capacity: int, faces: torch.device, seed: int) -> Peer:
    del faces
    return make(capacity, CPU, seed)
