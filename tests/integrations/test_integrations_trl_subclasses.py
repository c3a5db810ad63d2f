"""What a subclass of `PacedTrainer` overrides has the effect that it has on GRPOTrainer, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl

from paced_fast.errors import InputError


def build(kind: Any, folder: Path, **changes: Any) -> Any:
    return kind(
        tiny_policy.model(sharpness=2.0),
        tiny_trl.reward,
        tiny_trl.settings(folder, **{"max_steps": 1, **changes}),
        train_dataset=tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
    )


def trained(kind: Any, folder: Path, **changes: Any) -> Any:
    """Generates what others do: a trainer that is built seeds the random numbers."""
    made = build(kind, folder, **changes)
    made.train()
    return made


def moved(made: Any) -> dict[str, Tensor]:
    before = dict(tiny_policy.model(sharpness=2.0).named_parameters())
    model = made.accelerator.unwrap_model(made.model)
    return {name: p.detach() - before[name].detach() for name, p in model.named_parameters()}


class Halved(tiny_trl.Recorder):
    def _calculate_rewards(self, *given: Any) -> Tensor:
        return super()._calculate_rewards(*given) / 2 + 0.125


class HalvedBeside:
    def _calculate_rewards(self, *given: Any) -> Tensor:
        return super()._calculate_rewards(*given) / 2 + 0.125  # type: ignore[misc]


class Mixed(HalvedBeside, tiny_trl.Recorder):
    pass


class Own(tiny_trl.Recorder):
    """Rewards without a reward function."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
        found = tiny_trl.reward(prompts, completions, [row["answer"] for row in inputs])
        return torch.tensor(found)[:, None] / 2 + 0.125


@pytest.mark.parametrize("kind", [Halved, Mixed, Own])
def test_rewards_are_those_of_the_subclass(tmp_path: Path, kind: Any) -> None:
    plain, made = (trained(each, tmp_path) for each in (tiny_trl.Recorder, kind))
    expected, found = plain.batches[0], made.batches[0]
    order = expected["rewards"] / 2 + 0.125
    assert expected["rewards"].std() > 0.05
    torch.testing.assert_close(found["rewards"], order)
    torch.testing.assert_close(found["log_z"], expected["log_z"] / 2 + 0.125 / plain.args.tb_beta)
    log = made.state.log_history[0]
    assert log["reward"] == pytest.approx(float(order.mean()))
    # The policy is its own reference in the first step: the residual is log Z - reward, without the constant.
    ratio = log["tb/residual_rms"] / plain.state.log_history[0]["tb/residual_rms"]
    assert ratio == pytest.approx(0.5, rel=1e-4)


def test_rewards_that_are_replaced_on_the_trainer_itself_are_taken(tmp_path: Path) -> None:
    made = build(tiny_trl.Recorder, tmp_path)
    own = lambda inputs, *_: torch.arange(len(inputs), dtype=torch.float32)[:, None] / 8  # noqa: E731
    made._calculate_rewards = own
    made.train()
    assert made.batches[0]["rewards"].tolist() == [i / 8 for i in range(8)]
    assert made._calculate_rewards is own


def test_infinite_rewards_of_a_subclass_are_refused(tmp_path: Path) -> None:
    class Infinite(tiny_trl.Recorder):
        def _calculate_rewards(self, *given: Any) -> Tensor:
            return super()._calculate_rewards(*given) / 0.0

    with pytest.raises(InputError, match=r"^reward function reward returned an infinite reward"):
        build(Infinite, tmp_path).train()


@pytest.mark.parametrize("is_in_place", [True, False])
def test_changed_advantages_are_refused_for_they_have_no_effect(tmp_path: Path, is_in_place: bool) -> None:
    class Changed(tiny_trl.Recorder):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            if is_in_place:
                output["advantages"][0] = 7.0
            else:
                output["advantages"] = output["advantages"][:, None] * output["completion_mask"]
            return output

    made = build(Changed, tmp_path)
    with pytest.raises(InputError, match=r"^the advantages were changed .* change the rewards in _calculate_rewards"):
        made.train()
    assert made.state.global_step == 0


def test_a_mask_that_a_subclass_changes_leaves_its_tokens_out(tmp_path: Path) -> None:
    class Masked(tiny_trl.Recorder):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            output["completion_mask"] = output["completion_mask"] * 0
            return output

    made = build(Masked, tmp_path)
    made.train()
    assert max(float(change.abs().max()) for change in moved(made).values()) == 0.0


def test_log_probs_of_a_subclass_enter_the_loss(tmp_path: Path) -> None:
    class Doubled(tiny_trl.Recorder):
        """Log-probs twice as large have twice the gradient."""

        def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
            logprobs, *rest = super()._get_per_token_logps_and_entropies(*given, **named)
            return logprobs * 2, *rest

    settings = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    plain, made = (trained(kind, tmp_path, **settings) for kind in (tiny_trl.Recorder, Doubled))
    ours, theirs = moved(made), moved(plain)
    assert max(float(change.abs().max()) for change in theirs.values()) > 1e-3
    for name, change in ours.items():
        torch.testing.assert_close(change, 2 * theirs[name], rtol=1e-3, atol=1e-6)
