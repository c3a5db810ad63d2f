"""State that `PacedTrainer` keeps per prompt: a learned log Z, the sampling order, and completions to replay.

N = prompts in the dataset, G = completions per prompt, D = completions replayed per batch.
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

# Files in a checkpoint: the state shared by all processes, and the completions each process keeps for replay.
_SHARED, _REPLAY = "paced_prompts.pt", "paced_replay_{}.pt"

# How far a sum of rewards, with weights that add up to 1, may leave [0, 1] by float32 rounding.
_ROUNDING = 1e-5

# Fields a batch may have if replayed rows are to be added; not old log-probs, which those rows lack.
_REPLAYABLE = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
_REPLAYABLE |= {"rewards", "log_z", "weights", "prompt_index", "is_fresh"}


class LogZTable(nn.Module):
    """Table of value = beta * log Z per prompt, in (0, 1): sigmoid(a shared number + one number per prompt)."""

    def __init__(self, num_prompts: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(()))
        self.own = nn.Parameter(torch.zeros(num_prompts))

    def forward(self, prompt_index: Tensor) -> Tensor:
        return torch.sigmoid(self.shared + self.own[prompt_index])


class ReduceTable(TrainerCallback):
    """Average the table's gradient over processes and clip it separately: it is not part of the wrapped model."""

    def __init__(self, table: LogZTable, accelerator: Any) -> None:
        self.table, self.accelerator = table, accelerator

    def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
        """Average and clip the gradient before every optimizer step, on every process."""
        del args, options
        parameters = list(self.table.parameters())
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    def on_optimizer_step(self, *args: Any, **options: Any) -> None:
        """Clear the table's gradient after the step: the trainer clears only those of its model."""
        del args, options
        self.table.zero_grad()


class PacedSampler(Sampler[int]):
    """Sampler in TRL's order: scheduled prompts, each G times, and every such batch `repeat_count` times.

    A loader prefetches one batch, so a draw sees rewards only up to the batch before the last. Every process draws the
    same prompts, because the scheduler's observations are gathered from all processes.
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
        self.step = self.begin = 0  # batches drawn so far, and before this epoch
        self.drawn: list[list[int]] = []  # batches of this epoch
        self.repeated: list[list[int]] = []

    @property
    def num_batches(self) -> int:
        """Number of batches per epoch."""
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
        """Continue after `epochs` whole epochs.

        A resumed trainer iterates the epoch again and skips the batches it has used, so the batches drawn before,
        including the prefetched one, are repeated.
        """
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
    """Ring of correct completions of this process: those whose group's accuracy was furthest from the estimate."""

    def __init__(self, count: int, *, capacity: int, max_age: int, seed: int) -> None:
        self.count, self.max_age, self.seed = count, max_age, seed
        self.ring: deque[_Kept] = deque(maxlen=capacity)
        self.batch = 0

    def extend(self, output: dict[str, Any], accuracy: Tensor, values: Tensor) -> int:
        """Append D replayed rows to TRL's generation batch, store some of its own rows, and return how many were found.

        Appended rows that could not be filled have weight 0. `accuracy` and `values` [B] are per row, of its prompt.
        """
        self.batch += 1
        young = [kept for kept in self.ring if self.batch - kept.born <= self.max_age]
        source = torch.Generator().manual_seed(stream_seed(self.seed, self.batch, "replay"))
        chosen = [young[i] for i in torch.randperm(len(young), generator=source)[: self.count].tolist()]
        self._keep(output, accuracy, values)
        rows = {
            "prompt_ids": [kept.prompt.flip(0) for kept in chosen],  # reversed: these pad on the left
            "completion_ids": [kept.completion for kept in chosen],
        }
        for name, found in rows.items():
            mask_name = name.replace("ids", "mask")
            width = max([output[name].shape[1], *(len(row) for row in found)])
            ids = output[name].new_zeros(self.count, width)
            mask = output[mask_name].new_zeros(self.count, width)
            for i, row in enumerate(found):
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
            mask[len(found) :, 0] = 1  # attention needs at least one position
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
        """Return the state for `load_state_dict`, loadable with `weights_only=True`."""
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
    """Refuse rewards outside [0, 1], whose mean is not an accuracy; tolerate the rounding of a weighted sum."""
    if bool(((rewards - rewards.clamp(0.0, 1.0)).abs() > _ROUNDING).any()):
        found = f"these go from {float(rewards.min()):g} to {float(rewards.max()):g}"
        option, other = ("log_z='learned'", "log_z='group'") if learned else ("prompt_sampling='paced'", "'uniform'")
        raise InputError(
            f"{option} needs rewards in [0, 1], whose mean is an accuracy, and {found}: scale them, or use {other}"
        )


class PromptMemory:
    """All of this state for one process: table, scheduler and sampler are equal on every process, the ring is not."""

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
                f"train_dataset has {num_prompts} rows, but a generation batch takes {self.sampler.batch_size} "
                "prompts: use more rows or a smaller generation_batch_size"
            )
        seed = args.seed + process_index
        self.replay = Replay(args.replay, capacity=args.replay_capacity, max_age=args.replay_max_age, seed=seed)
        self.observed = 0  # number of generation batches

    @torch.no_grad()
    def values(self) -> Tensor | None:
        """Return the learned accuracy estimate of every prompt; None without a table."""
        if self.table is None:
            return None
        return self.table(torch.arange(len(self.table.own), device=self.device)).cpu()

    def log_z(self, inputs: dict[str, Any]) -> Tensor:
        """Return log Z per sequence of a micro-batch: in training from the table if there is one, else the group's."""
        if self.table is None or "prompt_index" not in inputs:
            return inputs["log_z"]
        log_z = self.table(inputs["prompt_index"]) / self.args.tb_beta
        # All replayed completions are correct: learning from them would make every prompt look easy.
        return torch.where(inputs["is_fresh"], log_z, log_z.detach())

    def observe(
        self,
        output: dict[str, Any],
        *,
        index: Tensor,  # i64[B], rows of this process
        every_index: Tensor,  # i64[all processes * B], as are the next three
        rewards: Tensor,
        accuracy: Tensor,
        scored: Tensor,
    ) -> int | None:
        """Pass group accuracies to the scheduler, append replayed rows to `output`; return their count (None = off)."""
        _check_accuracies(rewards, learned=self.table is not None)
        known = scored.view(-1, self.group_size).any(1).cpu()
        self.observed += 1
        first = slice(None, None, self.group_size)
        self.scheduler.observe(every_index[first].cpu(), accuracy[first].cpu(), known)
        output["prompt_index"], output["is_fresh"] = index, torch.ones_like(index, dtype=torch.bool)
        if self.table is None or not self.args.replay:
            return None
        output.pop("sampling_per_token_logps", None)  # from vLLM; only needed for importance weights
        others = set(output) - _REPLAYABLE
        if others:
            raise InputError(f"replay does not support {min(others)} of this batch: set replay=0")
        start = self.process_index * len(index)
        with torch.no_grad():
            return self.replay.extend(output, accuracy[start : start + len(index)], self.table(index))

    def save(self, folder: Path, *, epochs: int, is_rank0: bool) -> None:
        """Write to a checkpoint: every process its replay ring, rank 0 also the shared state."""
        folder.mkdir(parents=True, exist_ok=True)  # rank 0 may not have created it yet
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
        """Restore from a checkpoint; InputError if it lacks this state or has another number of prompts."""
        path = folder / _SHARED
        if not path.is_file():
            raise InputError(
                f"{path} is missing: this checkpoint was written without log_z='learned' and prompt_sampling='paced'"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if self.table is not None:
            found = 0 if state["log_z"] is None else len(state["log_z"]["own"])
            if found != len(self.table.own):
                raise InputError(
                    f"{path} has log Z of {found} prompts, but train_dataset has {len(self.table.own)} rows: give the "
                    "same data"
                )
            self.table.load_state_dict(state["log_z"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.observed = state["observed"]
        self.sampler.resume(**state["sampler"])
        path = folder / _REPLAY.format(self.process_index)
        if path.is_file():
            self.replay.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif self.args.replay:
            logger.warning("%s is missing: process %d starts with nothing to replay", path, self.process_index)
