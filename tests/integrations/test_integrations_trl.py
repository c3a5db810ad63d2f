"""`PacedTrainer` makes the updates of our own trainer, whatever the accumulation and the number of processes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_beside_ours import GROUP, assert_same, free_port, launch, our_parameters

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl

from paced_fast.config import SchedulerConfig
from paced_fast.errors import InputError
from paced_fast.integrations.trl_head import add_state_call
from paced_fast.integrations.trl_memory import PacedSampler
from paced_fast.paced.scheduler import PromptScheduler


@pytest.mark.parametrize(("accumulation", "fused"), [(1, True), (4, True), (4, False)])
def test_three_steps_are_those_of_our_trainer(tmp_path: Path, accumulation: int, fused: bool) -> None:
    made = tiny_trl.trainer(
        tmp_path,
        fused=fused,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    found = {name: p.detach() for name, p in made.model.named_parameters()}
    assert len(made.batches) == 3
    assert max(float((found[n] - before[n]).abs().max()) for n in found) > 9e-3
    assert_same(found, our_parameters([[batch] for batch in made.batches]))
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, batch in zip(logs, made.batches, strict=True):
        # The old policy is the policy: the residual is the reward's distance from its group's mean.
        groups = batch["rewards"].view(-1, GROUP)
        squares = (groups - groups.mean(1, keepdim=True)).square()
        assert entry["loss"] == pytest.approx(float(squares.mean() / (2 * 0.05)), rel=1e-4)
        assert entry["tb/importance_weight"] == pytest.approx(1.0)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_processes_make_the_updates_of_our_trainer(tmp_path: Path) -> None:
    first, second = launch(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same(first["state"], second["state"])
    assert len(first["batches"]) == 3
    steps = [list(pair) for pair in zip(first["batches"], second["batches"], strict=True)]
    assert_same(first["state"], our_parameters(steps))


def micro_batch(made: Any, *, old_shift: float | None) -> dict[str, Tensor]:
    """Five sequences of different lengths, one unscored with a NaN reward, old log-probs off by `old_shift`."""
    source = torch.Generator().manual_seed(3)
    lengths = torch.tensor([4, 1, 6, 3, 2])
    completion_mask = (torch.arange(6) < lengths[:, None]).long()
    prompt_mask = torch.tensor([[0, 1], [1, 1], [1, 1], [0, 1], [1, 1]])
    inputs = {
        "prompt_ids": torch.randint(2, 11, (5, 2), generator=source) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 11, (5, 6), generator=source) * completion_mask,
        "completion_mask": completion_mask,
        "rewards": torch.tensor([1.0, 0.0, 0.25, 0.5, torch.nan]),
        "log_z": torch.tensor([9.0, 9.0, 4.0, 4.0, 4.0]),
        "weights": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]),
        "num_trained": torch.tensor(4.0),
    }
    if old_shift is not None:
        noise = torch.rand(5, 6, generator=source) - 0.5
        inputs["old_per_token_logps"] = brute_logprobs(made, inputs).detach() + old_shift * noise
    return inputs


def brute_logprobs(made: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B, C] from full logits, each row without its padding."""
    rows = []
    for i in range(5):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        completion = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion])[None]
        hidden = made.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        table = (made.model.lm_head(hidden) / made.temperature).log_softmax(-1)[0, len(prompt) - 1 : -1]
        row = table.gather(1, completion[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(row, (0, 6 - len(row))))
    return torch.stack(rows)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("old_shift", [None, 1.5])
def test_the_loss_is_the_formula(tmp_path: Path, fused: bool, old_shift: float | None) -> None:
    made = tiny_trl.trainer(tmp_path, fused=fused, temperature=0.7, gradient_accumulation_steps=2)
    made.current_gradient_accumulation_steps = 2
    inputs = micro_batch(made, old_shift=old_shift)
    loss = made._compute_loss(made.model.train(), inputs)
    loss.backward()
    found = tiny_policy.gradients(made.model)
    made.model.zero_grad()
    logprobs = brute_logprobs(made, inputs)
    old = inputs.get("old_per_token_logps", logprobs.detach())
    log_ratio = ((logprobs - old) * inputs["completion_mask"]).sum(1)[:4]  # the last one is left out
    cap = made.args.importance_cap
    weight = log_ratio.detach().exp().clamp(max=cap)
    if old_shift is not None:
        assert weight.max() == torch.tensor(cap), "the cap is reached"
        assert weight.min() < 1.0
    residual = 0.05 * inputs["log_z"][:4] + 0.05 * log_ratio - inputs["rewards"][:4]
    # Four sequences are trained on in the generation batch, two micro-batches of it make the step.
    expected = (weight * residual.square() / (2 * 0.05)).sum() / 4
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    wanted = tiny_policy.gradients(made.model)
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=3e-5 * scale, msg=name)


def test_a_window_counts_its_share_of_the_generation_batch(tmp_path: Path) -> None:
    made = tiny_trl.trainer(tmp_path, gradient_accumulation_steps=2)
    made.current_gradient_accumulation_steps = 2
    inputs = micro_batch(made, old_shift=None)
    whole = made._compute_loss(made.model.train(), inputs)
    made.args.steps_per_generation = 4  # two windows share the four sequences
    half = made._compute_loss(made.model.train(), inputs)
    assert half.item() == pytest.approx(2 * whole.item(), rel=1e-6)


def test_unscored_completions_leave_the_mean_and_the_count(tmp_path: Path) -> None:
    def some(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [None, 1.0, 0.0, 0.5, None, None, None, 1.0]

    made = tiny_trl.trainer(tmp_path, reward_funcs=some, max_steps=1)
    made.train()
    batch = made.batches[0]
    assert batch["weights"].tolist() == [0, 1, 1, 1, 0, 0, 0, 1]
    assert batch["num_trained"] == 4
    torch.testing.assert_close(batch["log_z"] * 0.05, torch.tensor([0.5] * 4 + [1.0] * 4))
    # Residuals 0.5, -0.5, 0 and 0.
    assert made.state.log_history[0]["loss"] == pytest.approx(0.5 / 4 / (2 * 0.05), rel=1e-4)


def test_rewards_are_weighed_and_not_centred(tmp_path: Path) -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    made = tiny_trl.trainer(tmp_path, reward_funcs=[length, constant], reward_weights=[0.25, 2.0], max_steps=1)
    made.train()
    texts = list(made._logs["completion"])
    assert made.batches[0]["rewards"].tolist() == [0.25 * len(text) + 2.0 for text in texts]


def infinite(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * (len(completions) - 1) + [-torch.inf]


def test_infinite_rewards_are_refused_by_the_name_of_their_function(tmp_path: Path) -> None:
    made = tiny_trl.trainer(tmp_path, reward_funcs=[tiny_trl.reward, infinite], max_steps=1)
    before = [p.detach().clone() for p in made.model.parameters()]
    with pytest.raises(InputError, match="reward function infinite returned an infinite reward"):
        made.train()
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), before, strict=True))


def test_data_without_prompts_is_refused(tmp_path: Path) -> None:
    rows = tiny_trl.data().rename_column("prompt", "question")
    with pytest.raises(InputError, match="train_dataset has no column 'prompt', only answer, question"):
        tiny_trl.PacedTrainer(
            tiny_policy.model(sharpness=2.0), tiny_trl.reward, tiny_trl.settings(tmp_path), train_dataset=rows
        )


def needs_a_column(completions: list[str], solution: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.04}, "beta=0.04 is the weight of GRPO's KL term.*tb_beta"),
        ({"loss_type": "grpo"}, "loss_type='grpo' selects a GRPO loss"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' scales advantages"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 .* importance_cap"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01"),
        ({"log_z": "head"}, "log_z='head': use 'group' or 'learned'"),
        ({"tb_beta": 0.0}, "tb_beta=0.0 must be above 0"),
        ({"replay": 8}, "replay .* log_z='learned'"),
        ({"replay": 8, "log_z": "learned", "replay_max_age": 0}, "replay_max_age=0 must be at least 1"),
        ({"prompt_sampling": "paced", "rows": 1}, "1 rows, but a generation batch takes 2 prompts"),
        ({"reward_funcs": needs_a_column}, "needs_a_column needs the column 'solution', but train_dataset has answer"),
    ],
)
def test_wrong_use_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_trl.trainer(tmp_path, **changes)


def test_grpo_settings_are_refused_by_name(tmp_path: Path) -> None:
    from trl import GRPOConfig

    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8)
    with pytest.raises(InputError, match="args is a GRPOConfig: PacedTrainer needs PacedConfig"):
        tiny_trl.PacedTrainer(tiny_policy.model(), tiny_trl.reward, args, train_dataset=tiny_trl.data())


def test_token_weights_of_vllm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vllm_importance_sampling_mode='token_mask'"):
        tiny_trl.settings(tmp_path, use_vllm=True, vllm_importance_sampling_mode="token_mask")


def test_lora_trains_the_adapter_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = tiny_trl.Recorder(
        tiny_policy.model(sharpness=2.0),
        tiny_trl.reward,
        tiny_trl.settings(tmp_path, max_steps=2),
        train_dataset=tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_split_output_layer_is_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = tiny_policy.model()
    add_state_call(model)
    ids = torch.tensor([[2, 3, 4]])
    assert model(input_ids=ids, state_call=lambda hidden, weight, bias: weight)[0] is model.lm_head.weight
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        with pytest.raises(InputError, match=r"the output layer is split.*fused=False"):
            model(input_ids=ids, state_call=lambda hidden, weight, bias: weight)
    finally:
        dist.destroy_process_group()


def test_the_learned_log_z_moves_towards_the_rewards_of_its_prompts(tmp_path: Path) -> None:
    def by_prompt(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert "paced_prompt_index" not in columns
        return [float(int(p[0]) % 2) for p in prompts]

    made = tiny_trl.trainer(tmp_path, reward_funcs=by_prompt, log_z="learned", max_steps=6, log_z_learning_rate=0.2)
    made.train()
    values = made.memory.values()
    assert values is not None
    seen = torch.cat([batch["prompt_index"] for batch in made.batches])
    for prompt in set(seen.tolist()):
        # Half is where every value starts; a prompt's number decides its reward.
        is_right = int(made.train_dataset[prompt]["prompt"][0]) % 2 == 1
        assert (values[prompt] > 0.55) == is_right, (prompt, values)
    unseen = set(range(12)) - set(seen.tolist())
    own = made.memory.table.own.detach()
    assert all(float(own[prompt]) == 0.0 for prompt in unseen)


def test_replayed_completions_come_back_as_they_were(tmp_path: Path) -> None:
    made = tiny_trl.trainer(
        tmp_path, log_z="learned", replay=4, max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    made.train()
    found = 0
    earlier: set[tuple[tuple[int, ...], tuple[int, ...], float]] = set()
    for batch in made.batches:
        assert len(batch["rewards"]) == 12
        rows = []
        for i in range(12):
            prompt = tuple(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist())
            completion = tuple(batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist())
            rows.append((prompt, completion, float(batch["rewards"][i])))
        assert batch["is_fresh"].tolist() == [True] * 8 + [False] * 4
        for i in range(8, 12):
            if batch["weights"][i]:
                found += 1
                assert rows[i] in earlier
                assert rows[i][2] > 0.5
        assert batch["num_trained"] == batch["weights"].sum()
        earlier |= set(rows[:8])
    assert found > 0


def test_paced_sampling_draws_what_is_half_solved(tmp_path: Path) -> None:
    def by_prompt(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) if p[0] in "012" else 0.0 for i, p in enumerate(prompts)]

    made = tiny_trl.trainer(tmp_path, reward_funcs=by_prompt, prompt_sampling="paced", max_steps=40, learning_rate=1e-6)
    made.train()
    late = torch.cat([batch["prompt_index"] for batch in made.batches[20:]])
    # Prompts 0, 1 and 2 of twelve (and 9 to 11, which begin with 0 and 1) are half solved, the others never.
    half = [i for i in range(12) if made.train_dataset[i]["prompt"][0] in "012"]
    share = float(torch.isin(late, torch.tensor(half)).float().mean())
    assert share > 0.8, (half, share)


def test_a_checkpoint_holds_what_was_learned_of_prompts(tmp_path: Path) -> None:
    options = {"log_z": "learned", "prompt_sampling": "paced", "save_strategy": "steps", "save_steps": 2}
    made = tiny_trl.trainer(tmp_path, max_steps=2, **options)
    made.train()
    other = tiny_trl.trainer(tmp_path, max_steps=3, **options)
    seen: list[Tensor] = []
    make = other._generate_and_score_completions

    def first(inputs: Any) -> Any:
        seen.append(other.memory.values())
        return make(inputs)

    other._generate_and_score_completions = first
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(seen) == 1
    assert torch.equal(seen[0], made.memory.values())
    assert not torch.equal(seen[0], torch.full((12,), 0.5))
    assert other.memory.scheduler.visits.sum() == made.memory.scheduler.visits.sum() + 2


EVERYTHING = {
    "log_z": "learned",
    "prompt_sampling": "paced",
    "replay": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "log_z_learning_rate": 0.2,
}


def assert_resumed(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit, and not because nothing happened."""
    for name, value in expected["state"].items():
        assert torch.equal(found["state"][name], value), name
    for name, value in expected["table"].items():
        assert torch.equal(found["table"][name], value), name
    assert found["ring"] == expected["ring"]
    assert torch.equal(found["visits"], expected["visits"])
    assert float(expected["table"]["own"].abs().max()) > 0.01
    assert expected["ring"]


# Twelve prompts make six batches of two an epoch: the first run ends in the first epoch, the second is well into the
# second one, and its checkpoint is of the last step of the first.
@pytest.mark.parametrize(("stop", "end"), [(2, 4), (6, 9)])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, stop: int, end: int) -> None:
    options = {**EVERYTHING, "save_steps": stop, "max_steps": end}
    made = tiny_trl.trainer(tmp_path, **options)
    made.train()
    other = tiny_trl.trainer(tmp_path, **options)
    other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert len(other.batches) == end - stop
    assert torch.equal(other.batches[0]["completion_ids"], made.batches[stop]["completion_ids"])
    assert_resumed(tiny_trl.state_of(other), tiny_trl.state_of(made))


def test_generation_goes_on_where_it_would_have_been_after_a_resume(tmp_path: Path) -> None:
    """Two optimizer steps a generation: TRL alone counts from 0 again and generates at the odd ones after this."""
    options = {**EVERYTHING, "replay": 0, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    options |= {"per_device_train_batch_size": 4, "save_steps": 1, "max_steps": 4}
    made = tiny_trl.trainer(tmp_path, **options)
    made.train()
    for stop, left in ((2, 1), (3, 1)):  # at the end of a generation, and within the second
        other = tiny_trl.trainer(tmp_path, **options)
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert (other._step, len(other.batches)) == (4, left)
        if stop == 2:
            found, expected = tiny_trl.state_of(other), tiny_trl.state_of(made)
            for name, value in {**expected["state"], **expected["table"]}.items():
                assert torch.equal({**found["state"], **found["table"]}[name], value), name


@pytest.mark.parametrize("fused", [True, False])
def test_a_policy_is_as_likely_as_itself_in_bfloat16(tmp_path: Path, fused: bool) -> None:
    made = tiny_trl.trainer(
        tmp_path,
        bf16=True,
        fused=fused,
        learning_rate=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=2,  # the old policy is scored apart
        max_completion_length=24,
    )
    made.train()
    scored = ["old_per_token_logps" in batch for batch in made._buffered_inputs]
    assert scored == [not fused, True]  # the fused loss of the first step takes its own
    logs = [entry for entry in made.state.log_history if "tb/log_ratio" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert abs(entry["tb/log_ratio"]) < 1e-5
        assert entry["tb/importance_weight"] == pytest.approx(1.0, abs=1e-5)


def test_old_logprobs_are_those_of_full_logits(tmp_path: Path) -> None:
    made = tiny_trl.trainer(tmp_path, temperature=0.7)
    inputs = micro_batch(made, old_shift=None)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    shown = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        expected = brute_logprobs(made, inputs)
        found, entropy, _ = made._get_per_token_logps_and_entropies(
            made.model, ids, shown, 6, batch_size=2, compute_entropy=True
        )
        made.head = made.head._replace(way="host")
        theirs = made._get_per_token_logps_and_entropies(made.model, ids, shown, 6, compute_entropy=True)
    assert entropy is not None
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[mask], theirs[0][mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy[mask], theirs[1][mask], rtol=1e-4, atol=1e-5)


def test_the_forward_keeps_its_parameters(tmp_path: Path) -> None:
    """PEFT's prompt and prefix tuning look for input_ids."""
    plain = inspect.signature(tiny_policy.model(sharpness=2.0).forward).parameters
    assert list(inspect.signature(tiny_trl.trainer(tmp_path).model.forward).parameters) == list(plain)


def test_a_resumed_sampler_repeats_the_batches_that_were_drawn_on_older_estimates() -> None:
    scheduler = PromptScheduler(
        12, SchedulerConfig(rule="tree", warmup_steps=0, exploration=0.0), seed=0, device=tiny_policy.CPU
    )
    low, high = torch.full((12,), 0.01), torch.full((12,), 0.01)
    low[:6], high[6:] = 0.5, 0.5

    def sampler(values: Tensor) -> PacedSampler:
        return PacedSampler(scheduler, lambda: values, group_size=1, batch_size=2, repeat_count=1)

    before = sampler(low)
    stream = iter(before)
    drawn = [next(stream) for _ in range(6)]
    assert max(drawn) < 6
    after = sampler(high)
    after.resume(0, before.begin, before.drawn)
    found = list(after)
    assert found[:6] == drawn
    assert min(found[6:8]) >= 6
    # An epoch later there is nothing to repeat, and the steps go on counting.
    later = sampler(high)
    later.resume(1, before.begin, before.drawn)
    assert min(list(later)[:2]) >= 6
    assert later.step == 12


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path: Path) -> None:
    options = {**EVERYTHING, "max_steps": 2}
    tiny_trl.trainer(tmp_path, **options).train()
    other = tiny_trl.trainer(tmp_path, rows=11, **options)
    with pytest.raises(InputError, match="log Z of 12 prompts, but train_dataset has 11 rows"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def table_after(batches: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The table from its definition: the mean squared residual over all fresh completions of a step."""
    shared, own = torch.zeros((), requires_grad=True), torch.zeros(12, requires_grad=True)
    optimizer = torch.optim.AdamW([shared, own], lr=0.2, betas=(0.0, 0.99), eps=1e-3, weight_decay=0.0)
    for of_step in batches:
        rewards = torch.cat([batch["rewards"][batch["is_fresh"]] for batch in of_step])
        index = torch.cat([batch["prompt_index"][batch["is_fresh"]] for batch in of_step])
        trained = sum(float(batch["weights"].sum()) for batch in of_step)
        # The policy is its own reference here, so the residual is the value's distance from the reward.
        values = torch.sigmoid(shared + own[index])
        (((values - rewards) ** 2).sum() / (2 * 0.05) / trained).backward()
        torch.nn.utils.clip_grad_norm_([shared, own], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"shared": shared.detach(), "own": own.detach()}


@pytest.mark.slow
def test_two_processes_learn_one_log_z_and_resume(tmp_path: Path) -> None:
    options = {**EVERYTHING, "per_device_train_batch_size": 4, "max_steps": 3}
    made = launch(tmp_path, **options, resume="checkpoint-2")
    assert_same(made[0]["table"], made[1]["table"])
    assert_same(made[0]["table"], table_after([list(pair) for pair in zip(*(r["batches"] for r in made), strict=True)]))
    assert made[0]["ring"] != made[1]["ring"]
    for rank in made:
        assert len(rank["resumed"]["batches"]) == 1
        assert_resumed(rank["resumed"], rank)
