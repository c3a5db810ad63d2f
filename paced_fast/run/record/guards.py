"""Guards on a step's figures: named warnings when a figure indicates that training is going wrong.

They read only the step's record, so they never wait for a device, and every rank reaches the same verdict from the same
record without communication.
"""

from __future__ import annotations

import logging
import math
import statistics
import typing
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paced_fast.config import GuardConfig, WarningName
from paced_fast.data.step_record import ABSENT, StepRecord
from paced_fast.errors import TrainingError

logger = logging.getLogger(__name__)

_HEAD_STEPS = 20
_HEAD_STEPS_NEEDED = 5
_HEAD_LOSS_FLOOR = 1.0  # rewards lie in [0, 1], so a squared error above 1 is not a prediction error
_STUCK_FACTOR = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning that holds: its name, the figure and its bound in words, and the remedy."""

    name: str
    text: str
    remedy: str


class Guards:
    """Warnings of a run. `check` is called with every step's record, in order; its memory is part of checkpoints.

    A warning is logged when it first holds, and again when it holds `repeat_every` steps or more after that: a figure
    that moves about its bound says so as seldom as one that stays beyond it. `stop` raises, so that the step that stops
    the run is recorded first; what has been logged has no part in it.
    """

    def __init__(self, config: GuardConfig, *, speaks: bool = True, has_groups: bool = True) -> None:
        """`speaks`: whether this rank logs; all ranks reach the same verdicts. `has_groups`: whether a group has more
        than one completion, so that it can be mixed."""
        self.config, self.speaks, self.has_groups = config, speaks, has_groups
        self.rewards: deque[float] = deque(maxlen=config.patience)
        self.head_losses: deque[float] = deque(maxlen=_HEAD_STEPS)
        self.best_reward = 0.0
        """Highest mean reward over `patience` steps so far."""
        self.gap_steps = self.stuck_steps = self.same_steps = 0
        """Steps in a row, up to the last, in which the value was off or stuck, or no group was mixed."""
        self.said: dict[str, int] = {}
        """The step in which each warning was logged last."""
        self._fatal: Finding | None = None

    def check(self, record: StepRecord) -> list[str]:
        """Names of the warnings that hold in this step; logs those that were not logged in the last `repeat_every`
        steps."""
        step = record.step
        found = [finding for finding in self._findings(record) if finding is not None]
        for finding in found:
            last = self.said.get(finding.name)
            if last is None or step - last >= self.config.repeat_every:
                self.said[finding.name] = step
                if self.speaks:
                    logger.warning("step %d, %s: %s; %s", step, finding.name, finding.text, finding.remedy)
        self._fatal = next((finding for finding in found if finding.name in self.config.stop_on), None)
        return [finding.name for finding in found]

    def stop(self, step: int) -> None:
        """Raises TrainingError when a warning of `stop_on` holds in the step just checked."""
        if self._fatal is not None:
            finding = self._fatal
            raise TrainingError(f"step {step}, {finding.name}: {finding.text}; {finding.remedy} (--guard.stop-on)")

    def state_dict(self) -> dict[str, Tensor]:
        """State, so that a resumed run gives the same warnings."""
        said = [(float(_NAMES.index(name)), float(step)) for name, step in self.said.items()]
        scalars = [self.best_reward, float(self.gap_steps), float(self.stuck_steps), float(self.same_steps)]
        return {
            "rewards": torch.tensor(list(self.rewards), dtype=torch.float64),
            "head_losses": torch.tensor(list(self.head_losses), dtype=torch.float64),
            "scalars": torch.tensor(scalars, dtype=torch.float64),
            "said": torch.tensor(said, dtype=torch.float64).reshape(-1, 2),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; an empty one, from a checkpoint without guards, keeps the initial state."""
        if not state:
            return
        self.rewards = deque(state["rewards"].tolist(), maxlen=self.config.patience)
        self.head_losses = deque(state["head_losses"].tolist(), maxlen=_HEAD_STEPS)
        self.best_reward, gap, stuck, *same = state["scalars"].tolist()  # older checkpoints have three
        self.gap_steps, self.stuck_steps, self.same_steps = int(gap), int(stuck), int(sum(same))
        self.said = {_NAMES[int(number)]: int(step) for number, step in state["said"].tolist()}

    def _findings(self, record: StepRecord) -> Iterator[Finding | None]:
        yield from self._update(record)
        checks = (self._generator_mismatch, self._truncated, self._reward_collapse, self._value_gap, self._value_stuck)
        for check in (*checks, self._head_loss, self._no_signal):
            yield check(record)

    def _update(self, record: StepRecord) -> Iterator[Finding | None]:
        """Findings on the size of the update; if loss or gradient is not finite, that alone, because the others follow
        from it."""
        loss, norm = record.loss, record.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            text = f"loss is {loss:.3g}, gradient norm is {norm:.3g}"
            yield Finding("non_finite", text, "this step changed no parameter; the run stops if this continues")
            return
        yield _above("kl", "kl", record.kl, self.config.max_kl, _SLOWER)
        ratio, most = record.log_ratio_mean, self.config.max_log_ratio
        yield _above("log_ratio", "log_ratio_mean", ratio, most, _SLOWER, size=True)
        yield self._sample_share(record)

    def _sample_share(self, record: StepRecord) -> Finding | None:
        share, least = record.effective_sample_share, self.config.min_sample_share
        if share >= least:
            return None
        remedy = "a few completions dominate the step: lower --optimizer.learning-rate or --loss.importance-cap"
        return Finding("sample_share", f"effective_sample_share is {share:.3g}, below {least:g}", remedy)

    def _generator_mismatch(self, record: StepRecord) -> Finding | None:
        remedy = (
            "the generator samples from another distribution than the trainer computes: check its weights and "
            "sampling settings, or correct with --mismatch.mode"
        )
        figure, most = record.generator_mismatch_token_ratio, self.config.max_token_ratio
        return _above("generator_mismatch", "generator_mismatch_token_ratio", figure, most, remedy)

    def _truncated(self, record: StepRecord) -> Finding | None:
        remedy = "completions do not end within --generation.max-completion-tokens: raise it, or check the stop tokens"
        share, most = record.truncated_share, self.config.max_truncated_share
        return _above("truncated", "truncated_share", share, most, remedy)

    def _reward_collapse(self, record: StepRecord) -> Finding | None:
        self.rewards.append(float(record.reward_mean))
        if len(self.rewards) < self.config.patience:
            return None
        mean = math.fsum(self.rewards) / len(self.rewards)
        self.best_reward = max(self.best_reward, mean)
        if self.best_reward < self.config.healthy_reward or mean > self.config.collapsed_reward:
            return None
        text = f"mean reward over {len(self.rewards)} steps is {mean:.3g}, and has been {self.best_reward:.3g}"
        remedy = "check the rollouts and the reward; --resume auto returns to the last checkpoint"
        return Finding("reward_collapse", text, remedy)

    def _no_signal(self, record: StepRecord) -> Finding | None:
        self.same_steps = self.same_steps + 1 if self.has_groups and record.mixed_group_share == 0 else 0
        if self.same_steps < self.config.patience:
            return None
        text = (
            f"no group has been mixed in {self.same_steps} consecutive steps, and the mean reward is "
            f"{record.reward_mean:.3g}"
        )
        cure = (
            "take harder data, for every completion is right"
            if record.reward_mean >= 1
            else "check the reward on sample rollouts, or take easier data"
        )
        page = "docs/troubleshooting.md#rewards has the usual causes"
        return Finding("no_signal", text, f"there is nothing to learn from: {cure}; {page}")

    def _value_gap(self, record: StepRecord) -> Finding | None:
        values, accuracies = record.value_fresh, record.accuracy_fresh
        if values is ABSENT or accuracies is ABSENT or not values:
            return None
        value, accuracy = math.fsum(values) / len(values), math.fsum(accuracies) / len(accuracies)
        gap, most = abs(value - accuracy), self.config.max_value_gap
        self.gap_steps = 0 if gap <= most else self.gap_steps + 1
        if self.gap_steps < self.config.patience:
            return None
        text = (
            f"value {value:.3g} and accuracy {accuracy:.3g} of the drawn prompts have differed by more than {most:g} "
            f"in {self.gap_steps} consecutive steps"
        )
        remedy = "lower --log-z.learning-rate, or check which completions the reward accepts"
        return Finding("value_gap", text, remedy)

    def _value_stuck(self, record: StepRecord) -> Finding | None:
        values, accuracies = record.value_fresh, record.accuracy_fresh
        if values is ABSENT or accuracies is ABSENT or not values:
            return None
        accuracy, margin = math.fsum(accuracies) / len(accuracies), self.config.stuck_value
        at_zero = max(values) <= margin and accuracy >= _STUCK_FACTOR * margin
        at_one = min(values) >= 1 - margin and accuracy <= 1 - _STUCK_FACTOR * margin
        self.stuck_steps = self.stuck_steps + 1 if at_zero or at_one else 0
        if self.stuck_steps < self.config.patience:
            return None
        text = (
            f"every value has been within {margin:g} of {int(at_one)} in {self.stuck_steps} consecutive steps, but "
            f"accuracy is {accuracy:.3g}"
        )
        return Finding("value_stuck", text, "the head is saturated: lower --log-z.learning-rate and start over")

    def _head_loss(self, record: StepRecord) -> Finding | None:
        loss = record.head_loss
        if loss is ABSENT:
            return None
        usual = statistics.median(self.head_losses) if len(self.head_losses) >= _HEAD_STEPS_NEEDED else math.inf
        bound = max(self.config.max_head_loss_growth * usual, _HEAD_LOSS_FLOOR)
        if math.isfinite(loss):
            self.head_losses.append(float(loss))
            if loss <= bound:
                return None
        text = f"head_loss is {loss:.3g}, not below {bound:.3g} ({self.config.max_head_loss_growth:g} times its median)"
        return Finding("head_loss", text, "log Z diverges: lower --log-z.learning-rate")


def _above(name: str, key: str, figure: float, most: float, remedy: str, *, size: bool = False) -> Finding | None:
    """The warning for a figure above its bound; NaN is above any."""
    if (abs(figure) if size else figure) <= most:
        return None
    bound = f"more than {most:g} from 0" if size else f"above {most:g}"
    return Finding(name, f"{key} is {figure:.4g}, {bound}", remedy)


_SLOWER = "the policy moves too far per step: lower --optimizer.learning-rate or --optimizer.max-grad-norm"
_NAMES: tuple[str, ...] = typing.get_args(WarningName)
"""Checkpoints store a warning as its index here."""
