"""A program: the configuration lines of the adapter's docstrings, composed with verl's own; prints "fine"."""

from __future__ import annotations

import re
import sys

from hydra import compose, initialize_config_module
from verl.utils.config import omega_conf_to_dataclass

from paced_fast.integrations import verl, verl_fused


def lines(text: str | None) -> list[str]:
    """key=value of the indented blocks; the comment after it left out."""
    return re.findall(r"^    ([a-z_.]+=\S+)", text or "", flags=re.MULTILINE)


def main() -> None:
    """Hydra refuses a key that verl does not have; the dataclasses check types and combinations."""
    blocks = (verl.__doc__ or "").split("FlowRL's settings")
    assert len(blocks) == 2
    for name, block in zip(("paced_tb", "paced_flowrl"), blocks, strict=True):
        overrides = [*lines(block), *lines(verl_fused.__doc__)]
        assert len(overrides) >= 9, overrides
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer", overrides=[*overrides, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8"]
            )
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        assert actor.policy_loss.loss_mode == name
        assert (actor.use_kl_loss, actor.entropy_coeff) == (False, 0)
        assert actor.loss_agg_mode == {"paced_tb": "seq-mean-token-sum", "paced_flowrl": "seq-mean-token-mean"}[name]
        assert config.algorithm.adv_estimator == {"paced_tb": "paced_tb", "paced_flowrl": "grpo"}[name]
        assert config.actor_rollout_ref.model.use_fused_kernels
        assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend == "torch"
    sys.stdout.write("fine\n")


if __name__ == "__main__":
    main()
