"""Settings of `PacedTrainer`, and the options it refuses because they would silently have no effect on its loss."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from paced_fast.errors import InputError, pip_install

try:
    from trl.trainer.grpo_config import GRPOConfig
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.trl needs TRL ({error}): {pip_install('trl')}") from error

REFUSED = {
    "beta": "is the weight of GRPO's KL term; trajectory balance has tb_beta",
    "loss_type": "selects a GRPO loss",
    "epsilon": "clips GRPO's ratio; trajectory balance has importance_cap",
    "epsilon_high": "clips GRPO's ratio; trajectory balance has importance_cap",
    "delta": "clips GRPO's ratio; trajectory balance has importance_cap",
    "importance_sampling_level": "belongs to GRPO's loss; trajectory balance weights whole sequences",
    "scale_rewards": "scales advantages; trajectory balance takes raw rewards",
    "multi_objective_aggregation": "normalises rewards; trajectory balance takes their raw weighted sum",
    "off_policy_mask_threshold": "masks by advantages, which trajectory balance does not have",
    "top_entropy_quantile": "masks tokens, but the residual needs all of them",
    "entropy_coef": "adds a term to GRPO's loss",
    "use_adaptive_entropy": "adds a term to GRPO's loss",
    "sync_ref_model": "needs a reference model, and here the old policy is the reference",
    "use_bias_correction_kl": "belongs to GRPO's KL term",
    **dict.fromkeys(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"), "updates a reference model, and here the old policy is it"
    ),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), "belongs to the SAPO loss"),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), "belongs to the VESPO loss"
    ),
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "belongs to the entropy term of GRPO's loss",
    ),
    "label_smoothing_factor": "smooths a cross-entropy loss, which is not used here",
}
"""Options of GRPOConfig that do not apply here, each with the reason."""

ASKS_FOR_OURS = {"scale_rewards": ("none",), "importance_sampling_level": ("sequence",)}
"""Accepted non-default values, which trajectory balance implies anyway: raw rewards, per-sequence weights."""


@dataclass
class PacedConfig(GRPOConfig):
    """GRPOConfig plus the settings of trajectory balance; options of GRPO's loss alone are refused."""

    tb_beta: float = field(
        default=0.05, metadata={"help": "Reward units per nat: the residual is log Z + log ratio - reward / tb_beta."}
    )
    importance_cap: float = field(
        default=1.28, metadata={"help": "Upper bound of the detached weight exp(log pi - log pi_old) of a sequence."}
    )
    log_z: str = field(
        default="group",
        metadata={"help": "Estimate of log Z: 'group' (mean reward of the prompt's group) or 'learned' (by prompt)."},
    )
    log_z_learning_rate: float = field(
        default=0.05, metadata={"help": "Learning rate of the learned log Z, in an optimizer group of its own."}
    )
    prompt_sampling: str = field(
        default="uniform",
        metadata={"help": "'uniform' (TRL's order) or 'paced': prompts whose estimated accuracy is near one half."},
    )
    replay: int = field(
        default=0,
        metadata={
            "help": "Correct completions replayed with each generation batch, on each process; a multiple of "
            "steps_per_generation. Needs log_z='learned'."
        },
    )
    replay_capacity: int = field(default=128, metadata={"help": "Completions that each process keeps for replay."})
    replay_max_age: int = field(default=4, metadata={"help": "Generation batches after which a completion is dropped."})
    fused: bool = field(
        default=True,
        metadata={"help": "Compute the loss from hidden states in the fused op; False: from TRL's log-probs."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        for name, reason in REFUSED.items():
            accepted = (defaults.get(name), *ASKS_FOR_OURS.get(name, ()))
            if name in defaults and getattr(self, name) not in accepted:
                raise InputError(f"{name}={getattr(self, name)!r} {reason}: leave {name} out of PacedConfig")
        for name, choices in (("log_z", ("group", "learned")), ("prompt_sampling", ("uniform", "paced"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r}: use {choices[0]!r} or {choices[1]!r}")
        for name, low in (("tb_beta", 0.0), ("importance_cap", 0.0), ("log_z_learning_rate", 0.0)):
            if not getattr(self, name) > low:
                raise InputError(f"{name}={getattr(self, name)} must be above {low:g}")
        correction = self.use_vllm and self.vllm_importance_sampling_correction
        if correction and self.vllm_importance_sampling_mode not in ("sequence_mask", "sequence_truncate"):
            raise InputError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} gives no weights of "
                "whole sequences, which trajectory balance needs: use 'sequence_mask' or 'sequence_truncate'"
            )
        if self.prompt_sampling == "paced" and not self.shuffle_dataset:
            raise InputError(
                "shuffle_dataset=False keeps the order of the data, but prompt_sampling='paced' chooses its own: use "
                "one"
            )
        self._check_replay(correction)

    def _check_replay(self, correction: bool) -> None:
        assert self.steps_per_generation is not None
        if self.replay < 0 or self.replay % self.steps_per_generation:
            raise InputError(
                f"replay={self.replay} must be a multiple of steps_per_generation={self.steps_per_generation}, or 0"
            )
        if self.replay and self.log_z != "learned":
            raise InputError(
                "replay ranks completions by the error of the learned log Z: set log_z='learned', or replay=0"
            )
        if self.replay_max_age < 1:
            raise InputError(f"replay_max_age={self.replay_max_age} must be at least 1: at 0 nothing is ever replayed")
        if self.replay and self.replay_capacity < self.replay:
            raise InputError(f"replay_capacity={self.replay_capacity} must be at least replay={self.replay}")
        # Replayed rows have no log-probs of an old policy, so no row of their batch may require them.
        if self.replay and correction:
            raise InputError(
                "replayed completions have no log-probs of vLLM to correct with: set "
                "vllm_importance_sampling_correction=False, or replay=0"
            )
        every = self.steps_per_generation * self.num_iterations
        if self.replay and self.gradient_accumulation_steps % every:
            raise InputError(
                f"replay needs completions of the current policy, but {every} micro-batches (steps_per_generation * "
                f"num_iterations) do not divide gradient_accumulation_steps={self.gradient_accumulation_steps}: set "
                "replay=0"
            )
