"""What `PacedTrainer` remembers of prompts: a learned log Z, the order of prompts, completions to replay.

N = prompts of the data set, G = completions per prompt, D = completions replayed with a batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback

from paced_fast.config import SchedulerConfig, stream_seed
from paced_fast.errors import InputError
from paced_fast.integrations.trl_config import PacedConfig
from paced_fast.paced.scheduler import PromptScheduler

logger = logging.getLogger(__name__)

# In a checkpoint: what all processes share, and the completions that each keeps for replay.
_SHARED, _REPLAY = "paced_prompts.pt", "paced_replay_{}.pt"

# How far a sum of rewards whose weights are 1 together may leave [0, 1] in float32.
_ROUNDING = 1e-5

# What a generation batch may hold for rows to be added to it: no old log-probs, which those rows would need too.
_REPLAYABLE = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
_REPLAYABLE |= {"rewards", "log_z", "weights", "prompt_index", "is_fresh"}


class LogZTable(nn.Module):
    """value = beta * log Z of every prompt, in (0, 1): one number for all prompts, and one for each."""

    def __init__(self, num_prompts: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(()))
        self.own = nn.Parameter(torch.zeros(num_prompts))

    def forward(self, prompt_index: Tensor) -> Tensor:
        return torch.sigmoid(self.shared + self.own[prompt_index])


class ReduceTable(TrainerCallback):
    """The table is not part of the wrapped model: average its gradient over processes, and bound it on its own."""

    def __init__(self, table: LogZTable, accelerator: Any) -> None:
        self.table, self.accelerator = table, accelerator

    def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
        """Before every optimizer step, on every process."""
        del args, options
        parameters = list(self.table.parameters())
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    def on_optimizer_step(self, *args: Any, **options: Any) -> None:
        """After it: the trainer clears the gradients of its model alone."""
        del args, options
        self.table.zero_grad()


class PacedSampler(Sampler[int]):
    """TRL's order of indices (a batch of prompts, each G times, all of it `repeat_count` times), drawn by a scheduler.

    A loader asks for a batch ahead, so a draw knows the rewards up to the batch before the last. Every process draws
    the same, because what the scheduler has seen is gathered.
    """

    def __init__(
        self,
        scheduler: PromptScheduler,
        values: Callable[[], Tensor | None],
        *,
        group_size: int,
        batch_size: int,
        repeat_count: int,
    ) -> None:
        self.scheduler, self.values = scheduler, values
        self.group_size, self.batch_size, self.repeat_count = group_size, batch_size, repeat_count
        self.step = self.begin = 0  # batches drawn, and those before this epoch
        self.drawn: list[list[int]] = []  # of this epoch
        self.repeated: list[list[int]] = []

    @property
    def num_batches(self) -> int:
        """Of an epoch."""
        return self.scheduler.num_prompts // self.batch_size

    def __iter__(self) -> Iterator[int]:
        self.begin, self.drawn, known = self.step, [], iter(self.repeated)
        self.repeated = []
        for _ in range(self.num_batches):
            self.step += 1
            prompts = next(known, None)
            if prompts is None:
                prompts = self.scheduler.draw(self.batch_size, self.step, self.values()).tolist()
            self.drawn.append(prompts)
            for _ in range(self.repeat_count):
                for prompt in prompts:
                    yield from [prompt] * self.group_size

    def __len__(self) -> int:
        return self.num_batches * self.batch_size * self.group_size * self.repeat_count

    def resume(self, epochs: int, begin: int, drawn: list[list[int]]) -> None:
        """Go on after `epochs`: a resumed trainer asks for the epoch anew and skips what it had, so its batches are
        those of before, the one that was asked for ahead included."""
        self.step = epochs * self.num_batches
        self.repeated = drawn if begin == self.step else []


@dataclass(frozen=True, slots=True)
class _Kept:
    prompt: Tensor  # i64[p]
    completion: Tensor  # i64[c]
    reward: float
    prompt_index: int
    born: int  # number of the generation batch


class Replay:
    """A ring of correct completions of this process, those whose group's accuracy was furthest from the estimate."""

    def __init__(self, count: int, *, capacity: int, max_age: int, seed: int) -> None:
        self.count, self.max_age, self.seed = count, max_age, seed
        self.ring: deque[_Kept] = deque(maxlen=capacity)
        self.batch = 0

    def extend(self, output: dict[str, Any], accuracy: Tensor, values: Tensor) -> int:
        """Append D rows to TRL's generation batch, then keep of its own rows; how many were found.

        Rows that could not be filled have weight 0. `accuracy` and `values` [B] are those of the rows' prompts.
        """
        self.batch += 1
        young = [kept for kept in self.ring if self.batch - kept.born <= self.max_age]
        source = torch.Generator().manual_seed(stream_seed(self.seed, self.batch, "replay"))
        chosen = [young[i] for i in torch.randperm(len(young), generator=source)[: self.count].tolist()]
        self._keep(output, accuracy, values)
        rows = {
            "prompt_ids": [kept.prompt.flip(0) for kept in chosen],  # padded on the left: reversed for the padding
            "completion_ids": [kept.completion for kept in chosen],
        }
        for name, found in rows.items():
            mask_name = name.replace("ids", "mask")
            width = max([output[name].shape[1], *(len(row) for row in found)])
            ids = output[name].new_zeros(self.count, width)
            mask = output[mask_name].new_zeros(self.count, width)
            for i, row in enumerate(found):
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
            mask[len(found) :, 0] = 1  # attention over nothing is not defined
            left = name == "prompt_ids"
            pad = (width - output[name].shape[1], 0) if left else (0, width - output[name].shape[1])
            for key, new in ((name, ids), (mask_name, mask)):
                old = nn.functional.pad(output[key], pad)
                output[key] = torch.cat([old, new.flip(1) if left else new])
        device = output["rewards"].device
        numbers = {
            "rewards": [kept.reward for kept in chosen],
            "weights": [1.0] * len(chosen),
            "prompt_index": [kept.prompt_index for kept in chosen],
        }
        for name, found in numbers.items():
            values_ = torch.tensor(found, device=device, dtype=output[name].dtype)
            output[name] = torch.cat([output[name], nn.functional.pad(values_, (0, self.count - len(found)))])
        for name in ("log_z", "advantages"):
            output[name] = nn.functional.pad(output[name], (0, self.count))
        output["is_fresh"] = torch.arange(len(output["rewards"]), device=device) < len(output["rewards"]) - self.count
        return len(chosen)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; nothing that only a pickle could hold."""
        names = ("prompt", "completion", "reward", "prompt_index", "born")
        return {"batch": self.batch, "ring": [{name: getattr(kept, name) for name in names} for kept in self.ring]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.batch = state["batch"]
        self.ring.clear()
        self.ring.extend(_Kept(**kept) for kept in state["ring"])

    def _keep(self, output: dict[str, Any], accuracy: Tensor, values: Tensor) -> None:
        may_enter = (output["rewards"] > 0.5) & (output["weights"] > 0)
        priority = torch.where(may_enter, (accuracy - values).abs(), -1.0)
        for i in priority.argsort(descending=True, stable=True)[: self.count].tolist():
            if may_enter[i]:
                self.ring.append(
                    _Kept(
                        output["prompt_ids"][i][output["prompt_mask"][i].bool()].clone(),
                        output["completion_ids"][i][output["completion_mask"][i].bool()].clone(),
                        float(output["rewards"][i]),
                        int(output["prompt_index"][i]),
                        self.batch,
                    )
                )


def _check_accuracies(
    rewards: Tensor,  # [all processes * B]
    *,
    learned: bool,
) -> None:
    """Refuse rewards whose mean is no accuracy, but for the rounding of a weighted sum."""
    if bool(((rewards - rewards.clamp(0.0, 1.0)).abs() > _ROUNDING).any()):
        found = f"rewards from {float(rewards.min()):g} to {float(rewards.max()):g} have no accuracy as their mean"
        option, other = ("log_z='learned'", "log_z='group'") if learned else ("prompt_sampling='paced'", "'uniform'")
        raise InputError(f"{option} estimates an accuracy, and {found}: scale them to [0, 1], or use {other}")


class PromptMemory:
    """All of it, for one process: table, scheduler and sampler are alike on every process, the ring is its own."""

    def __init__(self, args: PacedConfig, num_prompts: int, *, device: torch.device, process_index: int) -> None:
        self.args, self.device, self.process_index = args, device, process_index
        self.table = LogZTable(num_prompts).to(device) if args.log_z == "learned" else None
        settings = SchedulerConfig(rule="history" if self.table is None else "tree")
        self.scheduler = PromptScheduler(num_prompts, settings, seed=args.seed, device=torch.device("cpu"))
        self.group_size = int(args.num_generations or 1)
        self.sampler = PacedSampler(
            self.scheduler,
            self.values,
            group_size=self.group_size,
            batch_size=int(args.generation_batch_size or 0) // self.group_size,
            repeat_count=args.num_iterations * int(args.steps_per_generation or 1),
        )
        if args.prompt_sampling == "paced" and not self.sampler.num_batches:
            raise InputError(
                f"train_dataset has {num_prompts} rows, and a generation batch takes {self.sampler.batch_size} "
                "prompts: use more rows or a smaller generation_batch_size"
            )
        seed = args.seed + process_index
        self.replay = Replay(args.replay, capacity=args.replay_capacity, max_age=args.replay_max_age, seed=seed)
        self.observed = 0  # generation batches

    @torch.no_grad()
    def values(self) -> Tensor | None:
        """Estimated accuracy of every prompt, where it is learned."""
        if self.table is None:
            return None
        return self.table(torch.arange(len(self.table.own), device=self.device)).cpu()

    def log_z(self, inputs: dict[str, Any]) -> Tensor:
        """log Z of a micro-batch's prompts: from the table where there is one and this is training."""
        if self.table is None or "prompt_index" not in inputs:
            return inputs["log_z"]
        log_z = self.table(inputs["prompt_index"]) / self.args.tb_beta
        # Replayed completions are correct ones: the estimate would learn from them that every prompt is easy.
        return torch.where(inputs["is_fresh"], log_z, log_z.detach())

    def observe(
        self,
        output: dict[str, Any],
        *,
        index: Tensor,  # i64[B] of this process
        every_index: Tensor,  # i64[all processes * B], like the next three
        rewards: Tensor,
        accuracy: Tensor,
        scored: Tensor,
    ) -> int | None:
        """Tell the scheduler the accuracy of every group, and add what is replayed to `output`: how many rows."""
        _check_accuracies(rewards, learned=self.table is not None)
        known = scored.view(-1, self.group_size).any(1).cpu()
        self.observed += 1
        first = slice(None, None, self.group_size)
        self.scheduler.observe(every_index[first].cpu(), accuracy[first].cpu(), self.observed, known)
        output["prompt_index"], output["is_fresh"] = index, torch.ones_like(index, dtype=torch.bool)
        if self.table is None or not self.args.replay:
            return None
        output.pop("sampling_per_token_logps", None)  # of vLLM; only weights would need them
        others = set(output) - _REPLAYABLE
        if others:
            raise InputError(f"replay does not know {min(others)} of this batch: set replay=0")
        start = self.process_index * len(index)
        with torch.no_grad():
            return self.replay.extend(output, accuracy[start : start + len(index)], self.table(index))

    def save(self, folder: Path, *, epochs: int, is_rank0: bool) -> None:
        """Into a checkpoint: every process what it keeps, rank 0 what all share."""
        folder.mkdir(parents=True, exist_ok=True)  # rank 0 may not have come so far
        if self.args.replay:
            torch.save(self.replay.state_dict(), folder / _REPLAY.format(self.process_index))
        if is_rank0:
            state = {
                "log_z": None if self.table is None else self.table.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "observed": self.observed,
                "sampler": {"epochs": epochs, "begin": self.sampler.begin, "drawn": self.sampler.drawn},
            }
            torch.save(state, folder / _SHARED)

    def load(self, folder: Path) -> None:
        """From a checkpoint; InputError for one of another kind of run."""
        path = folder / _SHARED
        if not path.is_file():
            raise InputError(f"{path} is missing: this checkpoint was written without log_z='learned' or sampling")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if self.table is not None:
            found = 0 if state["log_z"] is None else len(state["log_z"]["own"])
            if found != len(self.table.own):
                raise InputError(
                    f"{path} has log Z of {found} prompts, and train_dataset has {len(self.table.own)} rows"
                )
            self.table.load_state_dict(state["log_z"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.observed = state["observed"]
        self.sampler.resume(**state["sampler"])
        path = folder / _REPLAY.format(self.process_index)
        if path.is_file():
            self.replay.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif self.args.replay:
            logger.warning("%s is missing: process %d begins with nothing to replay", path, self.process_index)
