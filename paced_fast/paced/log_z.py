"""Log Z per prompt: value = beta * log Z, an estimate of the policy's accuracy (arXiv 2602.12642).

With the old policy as reference the squared trajectory-balance residual is least at beta * log Z = E[reward], so a head
on the prompt's embedding regresses on raw correctness. Its output goes through a sigmoid, because a raw log Z at small
beta has gradients hundreds of times larger and starves under any shared clip.

With `log_z.memory` on, two things are added to the paper's head: it is fitted to past groups as well, and a prompt's
value is a posterior mean, in which the prediction counts as `log_z.prior` completions beside the prompt's own recent
outcomes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paced_fast.config import LogZConfig, stream_seed
from paced_fast.policy.optimizer import GuardedAdamW
from paced_kernels import PriorityTree

# Prompts scored at once, so that the head's float32 activations stay small for any table size.
_BLOCK = 8192
# Prompts whose value is recomputed per step unless the setting says how many: all of most tables.
_WINDOW = 65_536


class LogZ:
    """3-layer MLP on frozen prompt embeddings, with an optimiser of its own, and the outcomes of each prompt.

    N = prompts, H = embedding size, P = groups, G = completions per group. `values` f32[N] are the latest estimates; of
    a table larger than `window` only so many are recomputed per step, in turn.
    """

    def __init__(self, embeddings: Tensor, config: LogZConfig, *, seed: int, bounded: bool) -> None:
        """`embeddings` f32[N, H]; `bounded` puts a sigmoid on the output (value), else it is a raw log Z."""
        self.config, self.bounded = config, bounded
        self.window = config.scored_per_step or _WINDOW
        self.mean = embeddings.mean(0)
        self.scale = embeddings.std(0, correction=0).clamp(min=1e-6)  # so that a table of one prompt works too
        self.inputs = self._standardise(embeddings)
        self.cursor = torch.zeros((), dtype=torch.int64, device=embeddings.device)  # where the next window begins
        width = config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp = nn.Sequential(
                nn.Linear(embeddings.shape[1], width),
                nn.GELU(),
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.GELU(),
                nn.LayerNorm(width),
                nn.Linear(width, 1),
            ).to(embeddings.device)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.1)  # start near one half for every prompt
            last.bias.zero_()
        self.optimizer = GuardedAdamW(self.mlp.parameters(), learning_rate=config.learning_rate)
        remembers = config.memory == "on"
        self.outcomes = Outcomes(len(embeddings), config.decay, embeddings.device) if remembers else None
        self.past = PastGroups(config.past_groups, seed, embeddings.device) if remembers else None
        self.values = self.all_values()

    def _standardise(self, embeddings: Tensor) -> Tensor:
        return ((embeddings.float() - self.mean) / self.scale).to(getattr(torch, self.config.cache_dtype))

    def _logits(self, inputs: Tensor) -> Tensor:
        return self.mlp(inputs.float())[:, 0]

    @torch.no_grad()
    def score(self) -> Tensor:
        """Recompute `values`, all of them or the next window, and return them."""
        count, size = len(self.inputs), self.window
        if not self.is_windowed:
            self.values.copy_(self.all_values())
            return self.values
        window = (self.cursor + torch.arange(size, device=self.cursor.device)) % count
        self.values.index_copy_(0, window, self.value(window))
        self.cursor.copy_((self.cursor + size) % count)
        return self.values

    @property
    def is_windowed(self) -> bool:
        """Whether `score` leaves prompts out, so that `values` has older ones."""
        return self.window < len(self.inputs)

    def rescore(self, prompt_index: Tensor) -> None:
        """Recompute the `values` of prompts i64[B], which the window of `score` may have left out."""
        self.values.index_copy_(0, prompt_index, self.value(prompt_index))

    @torch.no_grad()
    def value(self, prompt_index: Tensor) -> Tensor:
        """Estimates f32[B] of prompts i64[B]: the value in (0, 1) when bounded, else log Z."""
        predicted = self._output(self.inputs[prompt_index])
        if self.outcomes is None:
            return predicted
        return posterior_mean(
            predicted, self.outcomes.correct[prompt_index], self.outcomes.samples[prompt_index], self.config.prior
        )

    @torch.no_grad()
    def all_values(self) -> Tensor:
        """Estimates f32[N] of every prompt of the table."""
        predicted = self._output(self.inputs)
        if self.outcomes is None:
            return predicted
        return posterior_mean(predicted, self.outcomes.correct, self.outcomes.samples, self.config.prior)

    @torch.no_grad()
    def value_of(self, embeddings: Tensor) -> Tensor:
        """Head output f32[M] for prompts outside the table, given their embeddings [M, H]."""
        return self._output(self._standardise(embeddings))

    def _output(self, inputs: Tensor) -> Tensor:
        logits = torch.cat([self._logits(block) for block in inputs.split(_BLOCK)])
        return torch.sigmoid(logits) if self.bounded else logits

    def observe(self, prompt_index: Tensor, correct: Tensor, samples: Tensor, target: Tensor) -> None:
        """Remember the groups of a step, before `fit`.

        Of prompts i64[P]: the number of correct and of scored completions, and the mean target of the scored ones,
        f32[P] each.
        """
        if self.outcomes is not None and self.past is not None:
            self.outcomes.add(prompt_index, correct, samples)
            self.past.insert(prompt_index, target, samples)

    def fit(
        self, prompt_index: Tensor, target: Tensor, weight: Tensor | None = None, *, groups: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Fit the head to `target` f32[B] on prompts i64[B], weighted by `weight` f32[B]; returns the loss on them and
        the gradient norm.

        `tb`: mean squared residual in reward units, target = reward - beta * log ratio. `bce`: cross-entropy on raw
        correctness, target = reward. With a memory each update adds `past_per_fresh * groups` past groups; fresh and
        past groups count the same. A non-finite loss or gradient leaves the head as it was.
        """
        config, updates = self.config, self.config.updates_per_step
        inputs = self.inputs[prompt_index]
        loss = grad_norm = torch.zeros((), device=inputs.device)
        drawn = None
        if self.past is not None and updates:  # one draw for all updates, because a draw costs more than it computes
            drawn = [part.chunk(updates) for part in self.past.draw(updates * config.past_per_fresh * groups)]
        for k in range(updates):
            each = self._error(inputs, target)
            loss = (each if weight is None else each * weight).mean()
            total = loss
            if drawn is not None:
                index, goal, share = (part[k] for part in drawn)
                past = (self._error(self.inputs[index], goal) * share).sum() / share.sum().clamp(min=1.0)
                total = (loss + config.past_per_fresh * past) / (1 + config.past_per_fresh)
            self.optimizer.zero_grad()
            total.backward()
            grad_norm = nn.utils.clip_grad_norm_(self.mlp.parameters(), config.max_grad_norm)
            self.optimizer.guarded_step(total.detach(), grad_norm)
        return loss.detach(), grad_norm

    def _error(self, inputs: Tensor, target: Tensor) -> Tensor:
        logits = self._logits(inputs)
        if self.bounded and self.config.loss == "bce":
            return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (torch.sigmoid(logits) if self.bounded else logits).sub(target).square()

    def state_dict(self) -> dict[str, Tensor]:
        """State of the head besides its optimiser's; includes `values`, because a window leaves older ones in place."""
        state = {f"mlp.{name}": value for name, value in self.mlp.state_dict().items()}
        state |= {"values": self.values, "cursor": self.cursor}
        if self.outcomes is not None and self.past is not None:
            state |= {f"outcomes.{name}": value for name, value in self.outcomes.state_dict().items()}
            state |= {f"past.{name}": value for name, value in self.past.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`."""
        self.mlp.load_state_dict(_below("mlp", state))
        self.values.copy_(state["values"])
        self.cursor.copy_(state["cursor"])
        if self.outcomes is not None and self.past is not None:
            self.outcomes.load_state_dict(_below("outcomes", state))
            self.past.load_state_dict(_below("past", state))


def _below(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def posterior_mean(predicted: Tensor, correct: Tensor, samples: Tensor, prior: float) -> Tensor:
    """Mean accuracy under a Beta prior with mean `predicted` and strength `prior`, after `correct` of `samples`."""
    return (prior * predicted + correct) / (prior + samples)


class Outcomes:
    """Correct and scored completions of every prompt, older ones worth less: sums f32[N]."""

    def __init__(self, num_prompts: int, decay: float, device: torch.device) -> None:
        """`decay` is the factor per step of past outcomes."""
        self.decay = decay
        self.correct = torch.zeros(num_prompts, device=device)
        self.samples = torch.zeros(num_prompts, device=device)

    def add(self, prompt_index: Tensor, correct: Tensor, samples: Tensor) -> None:
        """Add the outcomes f32[P] of a step for prompts i64[P], and let the older ones fade."""
        for total, new in ((self.correct, correct), (self.samples, samples)):
            total.mul_(self.decay).index_add_(0, prompt_index, new)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"correct": self.correct, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


_RING = ("prompt_index", "target", "samples")


class PastGroups:
    """Ring of the latest C groups: prompt i64[C], target f32[C], scored completions f32[C]."""

    def __init__(self, capacity: int, seed: int, device: torch.device) -> None:
        """Make an empty ring; `seed` fixes every draw."""
        self.prompt_index = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.target = torch.zeros(capacity, device=device)
        self.samples = torch.zeros(capacity, device=device)
        self.inserted = torch.zeros((), dtype=torch.int64, device=device)
        self.tree = PriorityTree(capacity, seed=stream_seed(seed, 0, "past groups"), device=device, stream=2)

    def insert(self, prompt_index: Tensor, target: Tensor, samples: Tensor) -> None:
        """Insert P groups; the oldest leave. One whose target is no number counts for nothing."""
        samples = torch.where(target.isfinite(), samples, 0.0)
        target = torch.where(target.isfinite(), target, 0.0)
        capacity = len(self.target)
        count = min(len(prompt_index), capacity)
        slots = (self.inserted + torch.arange(count, device=self.target.device)) % capacity
        for name, new in zip(_RING, (prompt_index, target, samples), strict=True):
            getattr(self, name).index_copy_(0, slots, new[-count:])
        self.inserted += count
        self.tree.update(slots, (samples[-count:] > 0).float())

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, targets and numbers of scored completions of `count` groups, each as likely as the others."""
        slots = self.tree.sample(count, "iid").idx  # from an empty ring any, whose number is 0
        return self.prompt_index[slots], self.target[slots], self.samples[slots]

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that later draws depend on."""
        return {**self._ring(), **{f"tree.{name}": tensor for name, tensor in self.tree.state_dict().items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()`."""
        self.tree.load_state_dict(_below("tree", state))
        for name, tensor in self._ring().items():
            tensor.copy_(state[name])

    def _ring(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*_RING, "inserted")}
