"""Errors of a sampler: draws of weight 0, frequencies, drift of its sum, duplicates, results that are not repeatable.

The work is the same for every peer, at any cost: the numbers of draws and updates are settings, not times.

N = leaves, B = elements per call.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.tree.peers import Peer

CHUNK = 65536
HEAVIEST = 256


def known_weights(capacity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return weights f32 [N] on the CPU and the indices of the heaviest leaves, which hold about half of the total.

    A third of the leaves have weight 0, including the first and the last, where rounding at an end would show.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heavy = max(1, min(HEAVIEST, capacity // 8))
    weights = torch.rand(capacity, generator=generator) * (2.0 * num_heavy / capacity)
    weights[torch.rand(capacity, generator=generator) < 1 / 3] = 0.0
    heavy = (torch.arange(num_heavy) * capacity) // num_heavy + capacity // (2 * num_heavy)
    weights[heavy] = 1.0
    weights[0] = weights[-1] = 0.0
    return weights, heavy[(heavy > 0) & (heavy < capacity - 1)]


def _write_all(peer: Peer, weights: Tensor) -> None:
    """Write every leaf by updates, so that a sum maintained by differences can drift."""
    for part in torch.arange(peer.capacity).split(CHUNK):
        peer.update(part.to(peer.faces), weights[part].to(peer.faces))


def drift(peer: Peer, num_updates: int, seed: int) -> tuple[float | None, float | None]:
    """Return the error of the sum after random updates, and the sum left when all weights are 0; both relative.

    None if the sum is hidden. Afterwards the peer has the weights of `known_weights`.
    """
    generator = torch.Generator().manual_seed(seed)
    num = min(4096, peer.capacity)
    peer.rebuild(torch.rand(peer.capacity, generator=generator).to(peer.faces))
    for _ in range(num_updates):
        idx = torch.randint(0, peer.capacity, (num,), generator=generator)
        w = torch.rand(num, generator=generator) * (torch.rand(num, generator=generator) > 0.3)
        peer.update(idx.to(peer.faces), w.to(peer.faces))
    total = peer.total()
    error = rest = None
    if total is not None:
        exact = peer.leaves().sum().item()
        error = abs(total - exact) / exact
        _write_all(peer, torch.zeros(peer.capacity))
        left = peer.total()
        rest = None if left is None else abs(left) / exact
    _write_all(peer, known_weights(peer.capacity, seed)[0])
    return error, rest


def frequencies(peer: Peer, num_draws: int, seed: int) -> dict[str, Any]:
    """Return draws of leaves of weight 0, and the worst relative error of a heavy leaf's frequency, per mode."""
    weights, heavy = known_weights(peer.capacity, seed)
    share = weights[heavy].double() / weights.double().sum()
    found: dict[str, Any] = {"draws": num_draws, "zero_draws": {}, "outside": {}, "frequency_error": {}}
    for mode in peer.modes:
        counts = torch.zeros(peer.capacity, dtype=torch.int64)
        outside = 0
        left = num_draws
        while left > 0:
            idx = peer.sample(min(left, CHUNK), mode).cpu()
            is_inside = (idx >= 0) & (idx < peer.capacity)
            outside += int((~is_inside).sum())
            counts += torch.bincount(idx[is_inside], minlength=peer.capacity)
            left -= CHUNK
        found["zero_draws"][mode] = int(counts[weights == 0].sum())
        found["outside"][mode] = outside
        found["frequency_error"][mode] = (counts[heavy] / (num_draws * share) - 1).abs().max().item()
    # Expected error of the worst leaf by chance, for this number of independent draws.
    found["chance"] = math.sqrt(2 * math.log(2 * len(heavy)) / (num_draws * share.min().item()))
    return found


def duplicates_and_draws(peer: Peer, seed: int) -> tuple[bool, str]:
    """Return whether the last of duplicates won, and a digest of the weights and of draws in every mode."""
    generator = torch.Generator().manual_seed(seed)
    num = min(CHUNK, 16 * peer.capacity)
    few = torch.randperm(peer.capacity, generator=generator)[: max(1, num // 64)]
    idx = few[torch.randint(0, len(few), (num,), generator=generator)]
    w = torch.rand(num, generator=generator)
    peer.rebuild(known_weights(peer.capacity, seed)[0].to(peer.faces))
    expected = peer.leaves()
    peer.update(idx.to(peer.faces), w.to(peer.faces))
    last = torch.full((peer.capacity,), -1).scatter_reduce_(0, idx, torch.arange(num), "amax")
    expected = torch.where(last >= 0, w.double()[last.clamp(min=0)], expected)
    stored = peer.leaves()
    digest = hashlib.sha256(stored.numpy().tobytes())
    for mode in peer.modes:
        digest.update(peer.sample(min(CHUNK, num), mode).cpu().numpy().tobytes())
    return bool((stored - expected).abs().max() < 1e-6), digest.hexdigest()


def examine(
    make: Callable[[], Peer], *, num_draws: int, num_updates: int, repeats: int, seed: int = 0
) -> dict[str, Any]:
    """Return all findings on one peer; `make` creates it anew, with the same seed, for each repeat.

    Returns:
        drift, residue (relative, None if hidden), draws, zero_draws, outside, frequency_error (per mode), chance,
        last_writer_wins, distinct_results (1 = the same bits every time), repeats.
    """
    peer = make()
    error, rest = drift(peer, num_updates, seed)
    found = {"drift": error, "residue": rest, "updates": num_updates, **frequencies(peer, num_draws, seed)}
    del peer
    seen = [duplicates_and_draws(make(), seed) for _ in range(repeats)]
    found["last_writer_wins"] = all(won for won, _ in seen)
    return {**found, "distinct_results": len({digest for _, digest in seen}), "repeats": repeats}
