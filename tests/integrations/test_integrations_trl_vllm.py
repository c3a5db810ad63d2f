"""`PacedTrainer` with the vLLM modes of TRL, and with every option that touches what the loss is made of."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl
import trl_checked
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from paced_fast.errors import InputError
from paced_fast.integrations.trl import PacedConfig
from paced_fast.integrations.trl_config import REFUSED

MODES = ["server", "colocate"]


def build(folder: Path, *, kind: Any = trl_checked.Checked, config: Any = PacedConfig, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in ("rollout_func",) if name in changes}
    return kind(
        tiny_policy.model(sharpness=2.0),
        tiny_trl.reward,
        tiny_trl.settings(folder, config=config, **changes),
        train_dataset=tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
        **options,
    )


def trained(folder: Path, *, noise: float = 0.0, **changes: Any) -> tuple[Any, trl_checked.Engine]:
    """A run with an engine that stands in for vLLM's, with other weights than the trainer's until it is told."""
    engine = trl_checked.Engine(tiny_policy.model(seed=1), noise)
    with trl_checked.stand_in(engine):
        made = build(folder, **changes)
        made.train()
    return made, engine


@pytest.mark.parametrize("mode", MODES)
def test_the_defaults_of_trl_weigh_sequences(tmp_path: Path, mode: str) -> None:
    # Up to 6 tokens each off by up to 1: some ratios are above 3, which is TRL's bound, and are masked.
    made, _ = trained(tmp_path, noise=4.0, use_vllm=True, vllm_mode=mode)
    assert made.args.vllm_importance_sampling_correction
    assert made.args.vllm_importance_sampling_mode == "sequence_mask"
    assert len(made.ratios) == 24
    assert 0.0 in made.ratios
    assert max(made.ratios) > 1.2
    assert sum(0.0 < r < 0.8 for r in made.ratios) > 2
    logs = [entry["tb/importance_weight"] for entry in made.state.log_history if "loss" in entry]
    means = [sum(made.ratios[i : i + 8]) / 8 for i in (0, 8, 16)]
    assert logs == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_samples_with_the_weights_of_the_step(tmp_path: Path, mode: str) -> None:
    # Without noise and with the trainer's own weights on the other side, every ratio is one.
    made, _ = trained(tmp_path, use_vllm=True, vllm_mode=mode, vllm_enable_sleep_mode=mode == "colocate")
    assert made.ratios == pytest.approx([1.0] * 24, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_min": 0.5},
        {"vllm_importance_sampling_mode": "sequence_truncate", "fused": False},
        {"vllm_importance_sampling_correction": False},
        {"num_iterations": 2},
        {"steps_per_generation": 4, "per_device_train_batch_size": 2},
        {"log_z": "learned", "replay": 2, "vllm_importance_sampling_correction": False, "prompt_sampling": "paced"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_options_beside_vllm(tmp_path: Path, changes: dict[str, Any]) -> None:
    made, _ = trained(tmp_path, noise=4.0, use_vllm=True, vllm_mode="server", **changes)
    assert made.ratios
    if changes.get("vllm_importance_sampling_correction", True):
        assert max(made.ratios) == 3.0 or 0.0 in made.ratios
    else:
        assert set(made.ratios) == {1.0}
    if "num_iterations" in changes or "steps_per_generation" in changes:
        assert max(map(abs, made.log_ratios)) > 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm_mode": "server"},
        {"vllm_mode": "server", "steps_per_generation": 2, "per_device_train_batch_size": 4},
        {"vllm_mode": "colocate"},
        {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True},
        {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "num_iterations": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_engines_are_called_as_grpo_calls_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, ours = trained(tmp_path, use_vllm=True, **changes)
    _, theirs = trained(tmp_path, use_vllm=True, kind=GRPOTrainer, config=GRPOConfig, **changes)
    assert ours.calls == theirs.calls
    generations = [call for call in ours.calls if call[0] == "generate"]
    loads = [call for call in ours.calls if call[0] == "load"]
    assert len(loads) >= len(generations) * len(list(ours.model.parameters()))


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Four tokens each, of which the environment wrote the second."""
    ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    made = [[2 + (i + k) % 9 for k in range(3)] + [tiny_policy.STOP] for i in range(len(prompts))]
    return {
        "prompt_ids": ids,
        "completion_ids": made,
        "logprobs": [[-1.0] * 4 for _ in made],
        "env_mask": [[1, 0, 1, 1] for _ in made],
    }


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"rollout_func": rollouts},
        {"mask_truncated_completions": True},
        {"num_iterations": 2},
        {"num_iterations": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        {"steps_per_generation": 4, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
        {"pad_to_multiple_of": 8},
        {"cast_lm_head_to_fp32": True},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1},
        {"gradient_checkpointing": True, "disable_dropout": True},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_the_loss_is_the_formula_under_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fused: bool
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning about rollout_func
    made = build(tmp_path, fused=fused, **changes)
    made.train()
    assert made.state.global_step == 3
    assert made.ratios
    if "rollout_func" in changes:
        assert set(made.trained_tokens) == {3}
    if "mask_truncated_completions" in changes:
        weights = [float(w) for batch in made.batches for w in batch["weights"]]
        assert set(weights) == {0.0, 1.0}
        assert len(made.ratios) == sum(weights)
    if "num_iterations" in changes:
        reused = "gradient_accumulation_steps" not in changes  # otherwise both are of one step
        assert (max(map(abs, made.log_ratios)) > 0.05) == reused


# The fields that GRPOConfig adds to those of transformers. A field that is in neither list is one nobody has looked at.
WORKS = [
    "model_init_kwargs",
    "trust_remote_code",
    "router_aux_loss_coef",
    "disable_dropout",
    "cast_lm_head_to_fp32",
    "num_generations",
    "num_generations_eval",
    "max_completion_length",
    "ds3_gather_for_generation",
    "shuffle_dataset",
    "pad_to_multiple_of",
    "generation_batch_size",
    "steps_per_generation",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "generation_kwargs",
    "chat_template_kwargs",
    "repetition_penalty",
    "cache_implementation",
    "use_vllm",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "num_iterations",
    "reward_weights",
    "mask_truncated_completions",
    "max_tool_calling_iterations",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
    "log_completions",
    "log_multimodal",
    "num_completions_to_print",
    "log_unique_prompts",
    "log_completions_hub_repo",
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    "use_transformers_paged",
]

# Those of transformers and TRL's base that would be a part of a loss; the others are about optimizers, logs and files.
LOSS_OF_TRANSFORMERS = {"label_smoothing_factor"}

OTHER_VALUES = {
    "beta": 0.1,
    "loss_type": "sapo",
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "delta": 2.0,
    "importance_sampling_level": "word",
    "scale_rewards": "batch",
    "multi_objective_aggregation": "normalize_then_sum",
    "off_policy_mask_threshold": 0.5,
    "top_entropy_quantile": 0.2,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "sync_ref_model": True,
    "use_bias_correction_kl": False,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 7,
    "sapo_temperature_neg": 1.0,
    "sapo_temperature_pos": 1.1,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.5,
    "entropy_coef_delta": 0.1,
    "entropy_target": 0.1,
    "label_smoothing_factor": 0.1,
}


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items(), ids=list(OTHER_VALUES))
def test_options_of_other_losses_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}={value!r} .*: leave {name} out of PacedConfig"):
        tiny_trl.settings(tmp_path, **{name: value})


def test_every_option_of_trl_is_known_to_work_or_refused() -> None:
    own = {f.name for f in fields(GRPOConfig)} - {f.name for f in fields(TrainingArguments)}
    unknown = own - set(WORKS) - set(REFUSED)
    assert not unknown, f"new in GRPOConfig: read what {sorted(unknown)} do to the loss, then refuse or list them"
    assert not set(WORKS) & set(REFUSED)
    assert set(REFUSED) - own == LOSS_OF_TRANSFORMERS
    assert set(OTHER_VALUES) == set(REFUSED)
    assert len(own) > 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_z": "learned", "replay": 2, "use_vllm": True}, "vllm_importance_sampling_correction=False, or replay=0"),
        (
            {"log_z": "learned", "replay": 2, "num_iterations": 2},
            "but 2 micro-batches .* gradient_accumulation_steps=1: set replay=0",
        ),
        ({"log_z": "learned", "replay": 4, "steps_per_generation": 4}, "but 4 micro-batches"),
        ({"prompt_sampling": "paced", "shuffle_dataset": False}, "shuffle_dataset=False .*: use one"),
        (
            {"use_vllm": True, "vllm_importance_sampling_mode": "sequence_clip"},
            "mode='sequence_clip' gives no weights of whole sequences",
        ),
    ],
    ids=["vllm", "iterations", "generations", "order", "mode"],
)
def test_what_cannot_be_combined_is_refused_before_anything_is_generated(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tiny_trl.settings(tmp_path, **changes)


def test_prompts_keep_their_numbers_when_columns_are_removed(tmp_path: Path) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    made = tiny_trl.trainer(tmp_path, reward_funcs=constant, log_z="learned", remove_unused_columns=True)
    made.train()
    for batch in made.batches:
        for row, mask, index in zip(batch["prompt_ids"], batch["prompt_mask"], batch["prompt_index"], strict=True):
            prompt = made.train_dataset[int(index)]["prompt"]
            assert row[mask.bool()].tolist() == made.processing_class(prompt)["input_ids"]


def test_liger_kernels_of_layers_leave_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda _, config: seen.append(config))
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        made = build(tmp_path, use_liger_kernel=True)
    made.train()
    assert seen == [{"fused_linear_cross_entropy": False}]
    assert len(made.ratios) == 24


def test_ligers_loss_is_refused(tmp_path: Path) -> None:
    config = {"fused_linear_cross_entropy": True}
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"fused_linear_cross_entropy.* not supported"):
        build(tmp_path, use_liger_kernel=True, liger_kernel_config=config)
