"""AdamW that skips a step when the loss or gradient is not finite, on one rank or spread over several.

R = ranks. What AdamW steps are float32 masters: the parameters themselves where they are float32, else copies, from
which the parameters are rounded. Replicated parameters have their masters and moments split over the ranks by rows
(ZeRO stage 1, arXiv:1910.02054): each rank gets the sum of its rows' gradients, steps them, and all ranks gather the
result into the parameters where they lie. Gradients are summed over the ranks once per step, or after every
micro-batch, so that a rank keeps those of its rows only (ZeRO stage 2). The host never waits for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from paced_fast.policy.optimizer_parts import Part, all_gather, all_reduce, own_rows, part_of, reduce_scatter


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


class _Sent(NamedTuple):
    """A gradient that is being summed over the ranks."""

    work: dist.Work
    part: Part
    own: Tensor  # this rank's rows of the sum, once `work` has ended
    whole: Tensor  # kept until then


_MOST_IN_FLIGHT = 1
"""Whole gradients that are being summed while the next one is computed."""


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
    a micro-batch sends its gradients later than the others. With `split_gradients` that holds from the first
    `before_backward` on, and every rank makes as many backward passes: `skip_backward` stands for one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        mesh: DeviceMesh | None = None,
        split_gradients: bool = False,
    ) -> None:
        """AdamW on `parameters` by name. `mesh`: the ranks, in one dimension, that each have all of them.

        With `split_gradients` a rank of the mesh keeps its part of the gradients only; each is summed over the ranks as
        soon as a backward pass has computed it.

        Parameters that are sharded know their ranks themselves. Gradients are made to be float32, whatever the type of
        the parameter, so that micro-batches add up without rounding.
        """
        self._mesh = mesh if mesh is not None and mesh.size() > 1 else None
        self.split_gradients = split_gradients and self._mesh is not None
        self._parts = [part_of(name, parameter, self._mesh) for name, parameter in parameters.items()]
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
        self._found: set[str] = set()  # parameters that had a gradient in this step
        self._in_flight: deque[_Sent] = deque()
        self._is_begun = False  # a backward pass whose gradients are not all sent
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
        self._found.clear()
        self._works.clear()
        self._in_flight.clear()
        self._num_sent, self._is_last, self._is_begun = 0, False, False

    def before_backward(self, *, is_last: bool) -> None:
        """Say whether the next backward pass is the last of this step on this rank."""
        if self.split_gradients:
            self._finish_pass()
            self._is_begun = True
        self._is_last = is_last or self.split_gradients

    def skip_backward(self) -> None:
        """Stand for a backward pass that other ranks make and this one, for want of micro-batches, does not; with
        `split_gradients` only."""
        assert self.split_gradients
        self._finish_pass()
        self._is_begun = True
        self._finish_pass()

    def _finish_pass(self) -> None:
        """Send what the last backward pass has not: zeros for parameters that it did not reach."""
        if self._is_begun:
            while self._num_sent < len(self._split):
                self._send()
        self._final.clear()
        self._num_sent, self._is_begun = 0, False

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
                own_rows(part, part.parameter).copy_(part.master)
        works = []
        for part in self._split:
            whole = part.parameter.detach()
            if part.is_even:
                works.append(all_gather(whole, own_rows(part, whole)))
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

    def _counted(self) -> list[Part]:
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
        else:
            self._found.add(part.name)
        grad = grad.contiguous()
        if part.is_even:
            own = torch.empty_like(part.master)
            work = reduce_scatter(own, grad)
        else:
            work = all_reduce(grad)
            own = own_rows(part, grad)
        if not self.split_gradients:
            self._works.append(work)
            part.master.grad = own
            return
        part.parameter.grad = None
        self._in_flight.append(_Sent(work, part, own, grad))
        while len(self._in_flight) > _MOST_IN_FLIGHT:
            self._receive()

    def _receive(self) -> None:
        """Add the oldest gradient in flight to this rank's part of the sum; the whole one is given back."""
        sent = self._in_flight.popleft()
        sent.work.wait()
        master = sent.part.master
        if master.grad is None:
            master.grad = sent.own if sent.part.is_even else sent.own.clone()  # a view keeps the whole gradient
        else:
            master.grad.add_(sent.own)

    def _collect(self) -> None:
        """Give every master its gradient, summed over the ranks."""
        if self._mesh is None:
            for part in self._parts:
                grad = part.parameter.grad
                part.master.grad = grad.to_local() if isinstance(grad, DTensor) else grad
            return
        # Told from host to host: nobody waits for a device. A rank without a micro-batch has no gradient of any.
        if self.split_gradients:
            self._finish_pass()
            while self._in_flight:
                self._receive()
        else:
            while self._num_sent < len(self._split):
                self._send()
        counts = torch.tensor(
            [part.name in self._found or part.parameter.grad is not None for part in self._parts], dtype=torch.int32
        )
        small = [part for part in self._parts if not part.rows]
        if small:
            grads = [part.parameter.grad for part in small]
            filled = [
                torch.zeros_like(part.master) if grad is None else grad for part, grad in zip(small, grads, strict=True)
            ]
            flat = torch.cat([grad.flatten() for grad in filled])
            self._works.append(all_reduce(flat))
            for part, grad in zip(small, flat.split([part.master.numel() for part in small]), strict=True):
                part.master.grad = grad.view_as(part.master)
        self._works.append(all_reduce(counts))
        for work in self._works:
            work.wait()
        for part, is_found in zip(self._parts, _are_found(counts), strict=True):
            if not is_found:  # no rank has a gradient: skip it, because a step with zeros would decay it
                part.master.grad = None
        for part in self._split:
            part.parameter.grad = None  # before the step: the whole gradients are R times what the masters need


def _are_found(counts: Tensor) -> list[bool]:
    """Whether each of the counts, which lie on the host, is above 0."""
    return [count > 0 for count in counts.tolist()]


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
