"""AdamW that skips a step when the loss or gradient is not finite, on one rank or spread over several.

R = ranks. What AdamW steps are float32 masters: the parameters themselves where they are float32, else copies, from
which the parameters are rounded. Replicated parameters have their masters and moments split over the ranks by rows
(ZeRO stage 1, arXiv:1910.02054): each rank gets the sum of its rows' gradients, steps them, and all ranks gather the
result into the parameters where they lie. The host never waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard


class GuardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with learning rate and skip flag on the device of the parameters."""

    found_inf: Tensor | None  # read by torch's fused step: 1.0 leaves parameters, moments and step counts as they are

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        """AdamW on `parameters`, all on one device, starting at `learning_rate`."""
        own = list(parameters)
        rate = torch.full((), learning_rate, device=own[0].device)
        super().__init__(own, lr=rate, betas=betas, weight_decay=weight_decay, fused=True, capturable=rate.is_cuda)
        self.found_inf = None

    @property
    def learning_rate(self) -> Tensor:
        """The learning rate, f32[] on the device; fill it in place."""
        return self.param_groups[0]["lr"]

    def guarded_step(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Step if both scalars are finite, else change nothing; whether it was taken, bool[] on the device."""
        taken = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.found_inf = (~taken).float()
        self.step()
        return taken


class Step(NamedTuple):
    """Figures of an optimiser step, the same on every rank."""

    loss: Tensor  # f32[], the ranks' losses together
    grad_norm: Tensor  # f32[], of the whole gradient, before clipping
    taken: Tensor  # bool[], False where either is not finite and nothing has changed


@dataclass(frozen=True, slots=True)
class _Part:
    """Part of one parameter that one rank updates."""

    name: str
    parameter: nn.Parameter  # what the model computes with
    master: Tensor  # f32: the rows of this rank, or all; a view of the parameter where that is float32
    mesh: DeviceMesh | None  # None: this rank has all of it
    placements: tuple[Placement, ...]
    rows: tuple[tuple[int, int], ...]  # of every rank, first and past the last; empty unless a replica is split

    @property
    def is_even(self) -> bool:
        """Whether every rank has the same number of rows."""
        return self.parameter.shape[0] % len(self.rows) == 0

    def spread(self, local: Tensor) -> Tensor:
        """A tensor shaped as `master`, as part of one shaped as the parameter."""
        if self.mesh is None:
            return local
        shape, stride = self.parameter.shape, self.parameter.stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)


class PolicyOptimizer(GuardedAdamW):
    """AdamW on float32 masters of the policy's parameters, on one rank or spread over R of them.

    A step::

        optimizer.zero_grad()
        for each micro-batch of this rank (there may be none):
            optimizer.before_backward(is_last=...)  # on the last one gradients travel as soon as they are final
            loss.backward()                         # a sum over the batch, so ranks add up
        step = optimizer.clip_and_step(loss, max_norm)

    As torch's AdamW has it, a parameter without a gradient (on any rank) is not stepped, so it is not decayed either.

    Between the last `before_backward` and `clip_and_step` no other exchange between ranks may be begun: a rank without
    a micro-batch sends its gradients later than the others.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """AdamW on `parameters` by name. `mesh`: the ranks, in one dimension, that each have all of them.

        Parameters that are sharded know their ranks themselves. Gradients are made to be float32, whatever the type of
        the parameter, so that micro-batches add up without rounding.
        """
        self._mesh = mesh if mesh is not None and mesh.size() > 1 else None
        self._parts = [_part(name, parameter, self._mesh) for name, parameter in parameters.items()]
        super().__init__(
            [part.master for part in self._parts], learning_rate=learning_rate, betas=betas, weight_decay=weight_decay
        )
        for part in self._parts:  # made now, as torch would at the first step, so that a resumed run can load into them
            count = torch.zeros((), dtype=torch.float32, device=part.master.device)
            moments = {name: torch.zeros_like(part.master) for name in ("exp_avg", "exp_avg_sq")}
            self.state[part.master] = {"step": count, **moments}
            if part.master.dtype != part.parameter.dtype:
                part.parameter.grad_dtype = part.master.dtype
        # The last layers' gradients come first; the order is the same on ranks that make none.
        self._split = [part for part in reversed(self._parts) if part.rows]
        self._final: set[str] = set()
        self._num_sent = 0
        self._works: list[dist.Work] = []
        self._is_last = False
        for part in self._split:
            part.parameter.register_post_accumulate_grad_hook(lambda _, name=part.name: self._send_from(name))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient; they are always set to None."""
        assert set_to_none
        for part in self._parts:
            part.parameter.grad = part.master.grad = None
        self._final.clear()
        self._works.clear()
        self._num_sent, self._is_last = 0, False

    def before_backward(self, *, is_last: bool) -> None:
        """Say whether the next backward pass is the last of this step on this rank."""
        self._is_last = is_last

    def clip_and_step(self, loss: Tensor, max_norm: float) -> Step:
        """Sum gradients and the ranks' parts f32[] of the loss, scale the gradient down to `max_norm`, and step.

        A loss or gradient that is not finite on one rank leaves parameters, moments and step counts of all unchanged.
        Every rank calls it together with the others. The gradients are gone afterwards.
        """
        self._collect()
        grads = [part.master.grad for part in self._counted() if part.master.grad is not None]
        norm = nn.utils.get_total_norm(grads).to(loss.device)  # without any, torch's zero lies on the host
        if (replicas := self._replicas()) is not None:
            sums = torch.stack([norm.square(), loss.float()])
            dist.all_reduce(sums)
            norm, loss = (sums[0] / replicas).sqrt(), sums[1]
        masters = [part.master for part in self._parts]
        nn.utils.clip_grads_with_norm_(masters, max_norm, norm)
        taken = self.guarded_step(loss, norm)
        self.zero_grad()
        self.publish()
        return Step(loss, norm, taken)

    def named_state(self) -> dict[str, Tensor]:
        """The masters (`policy.NAME`) and the optimiser's state (`optimizer.NAME.KEY`): the tensors themselves.

        What is split over ranks comes as a DTensor, what every rank has as a plain tensor. Loading writes into them,
        on any number of ranks and in either mode, and then calls `publish`.
        """
        state: dict[str, Tensor] = {}
        for part in self._parts:
            state[f"policy.{part.name}"] = part.spread(part.master.detach())
            own = self.state[part.master]
            state[f"optimizer.{part.name}.step"] = own["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"optimizer.{part.name}.{key}"] = part.spread(own[key])
        return state

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the parameters, in place: rounded, and gathered from all ranks."""
        for part in self._parts:
            if part.master.dtype != part.parameter.dtype:
                _own_rows(part, part.parameter).copy_(part.master)
        works = []
        for part in self._split:
            whole = part.parameter.detach()
            if part.is_even:
                works.append(_all_gather(whole, _own_rows(part, whole)))
                continue
            for rank, (start, stop) in enumerate(part.rows):
                if start < stop:
                    works.append(dist.broadcast(whole[start:stop], rank, async_op=True))
        for work in works:
            work.wait()

    def _replicas(self) -> int | None:
        """Number of ranks that hold each gradient after summing; None without other ranks."""
        if self._mesh is not None:
            return 1
        mesh = self._parts[0].mesh
        if mesh is None:
            return None
        shards = [
            size for size, placement in zip(mesh.shape, self._parts[0].placements, strict=True) if placement.is_shard()
        ]
        return mesh.size() // shards[0]

    def _counted(self) -> list[_Part]:
        """Parts whose gradient this rank adds to the norm; a part that every rank updates is counted by one of them."""
        is_first = self._mesh is None or self._mesh.get_local_rank() == 0
        return [part for part in self._parts if is_first or part.rows]

    def _send_from(self, name: str) -> None:
        """Called when a gradient is accumulated: after the last backward pass it is final, and is sent after those
        before it."""
        if not self._is_last:
            return
        self._final.add(name)
        while self._num_sent < len(self._split) and self._split[self._num_sent].name in self._final:
            self._send()

    def _send(self) -> None:
        """Begin to sum the next split parameter's gradient over the ranks; a rank without one adds zeros."""
        part = self._split[self._num_sent]
        self._num_sent += 1
        grad = part.parameter.grad
        if grad is None:
            grad = torch.zeros_like(part.parameter, dtype=torch.float32)
        grad = grad.contiguous()
        if part.is_even:
            part.master.grad = torch.empty_like(part.master)
            self._works.append(_reduce_scatter(part.master.grad, grad))
        else:
            self._works.append(_all_reduce(grad))
            part.master.grad = _own_rows(part, grad)

    def _collect(self) -> None:
        """Give every master its gradient, summed over the ranks."""
        if self._mesh is None:
            for part in self._parts:
                grad = part.parameter.grad
                part.master.grad = grad.to_local() if isinstance(grad, DTensor) else grad
            return
        # Told from host to host: nobody waits for a device. A rank without a micro-batch has no gradient of any.
        counts = torch.tensor([part.parameter.grad is not None for part in self._parts], dtype=torch.int32)
        while self._num_sent < len(self._split):
            self._send()
        small = [part for part in self._parts if not part.rows]
        if small:
            grads = [part.parameter.grad for part in small]
            filled = [
                torch.zeros_like(part.master) if grad is None else grad for part, grad in zip(small, grads, strict=True)
            ]
            flat = torch.cat([grad.flatten() for grad in filled])
            self._works.append(_all_reduce(flat))
            for part, grad in zip(small, flat.split([part.master.numel() for part in small]), strict=True):
                part.master.grad = grad.view_as(part.master)
        self._works.append(_all_reduce(counts))
        for work in self._works:
            work.wait()
        for part, is_found in zip(self._parts, _are_found(counts), strict=True):
            if not is_found:  # no rank has a gradient: skip it, because a step with zeros would decay it
                part.master.grad = None
        for part in self._split:
            part.parameter.grad = None  # before the step: the whole gradients are R times what the masters need


def _part(name: str, parameter: nn.Parameter, mesh: DeviceMesh | None) -> _Part:
    """Part of a parameter that this rank updates: its own rows of a matrix, all of a vector, its shard of a sharded
    one."""
    if isinstance(parameter, DTensor):
        local = parameter.to_local().detach()
        assert local.dtype == torch.float32, f"{name}: sharded parameters are their own masters"
        return _Part(name, parameter, local, parameter.device_mesh, tuple(parameter.placements), ())
    is_master = parameter.dtype in (torch.float32, torch.float64)
    if mesh is None or parameter.dim() < 2 or parameter.shape[0] < mesh.size():
        master = parameter if is_master else parameter.detach().float()
        return _Part(name, parameter, master, None, (), ())
    assert parameter.is_contiguous(), f"{name}: rows that are gathered in place must lie together"
    count, size = parameter.shape[0], -(-parameter.shape[0] // mesh.size())  # as torch.chunk and DTensor split
    starts = [min(rank * size, count) for rank in range(mesh.size() + 1)]
    rows = tuple(itertools.pairwise(starts))
    start, stop = rows[mesh.get_local_rank()]
    master = parameter.detach()[start:stop]
    return _Part(name, parameter, master if is_master else master.float(), mesh, (Shard(0),), rows)


def _own_rows(part: _Part, whole: Tensor) -> Tensor:
    """This rank's rows of a tensor shaped as the parameter."""
    if not part.rows:
        return whole
    assert part.mesh is not None
    start, stop = part.rows[part.mesh.get_local_rank()]
    return whole[start:stop]


def _are_found(counts: Tensor) -> list[bool]:
    """Whether each of the counts, which lie on the host, is above 0."""
    return [count > 0 for count in counts.tolist()]


def _all_reduce(tensor: Tensor) -> dist.Work:
    return _begun(dist.all_reduce(tensor, async_op=True))


def _reduce_scatter(own: Tensor, whole: Tensor) -> dist.Work:
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name before torch 2.13
    return _begun(reduce(own, whole, async_op=True))


def _all_gather(whole: Tensor, own: Tensor) -> dist.Work:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _begun(gather(whole, own, async_op=True))


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an AdamW as a flat dict `INDEX.NAME`, in the order of its parameters; zeros before the first step.

    AdamW makes its state in the first step, so without the zeros a fresh one would have nothing to load into.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned; settings such as the learning rate stay the optimiser's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
