"""What `PacedTrainer` remembers of prompts: a learned log Z, the order of prompts, completions to replay.

N = prompts of the data set, G = completions per prompt, D = completions replayed with a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from paced_fast.config import stream_seed
from paced_fast.scheduler import PromptScheduler


class LogZTable(nn.Module):
    """value = beta * log Z of every prompt, in (0, 1): one number for all prompts, and one for each."""

    def __init__(self, num_prompts: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(()))
        self.own = nn.Parameter(torch.zeros(num_prompts))

    def forward(self, prompt_index: Tensor) -> Tensor:
        return torch.sigmoid(self.shared + self.own[prompt_index])


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
        self.step = 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.scheduler.num_prompts // self.batch_size):
            self.step += 1
            prompts = self.scheduler.draw(self.batch_size, self.step, self.values()).tolist()
            for _ in range(self.repeat_count):
                for prompt in prompts:
                    yield from [prompt] * self.group_size

    def __len__(self) -> int:
        batches = self.scheduler.num_prompts // self.batch_size
        return batches * self.batch_size * self.group_size * self.repeat_count


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
