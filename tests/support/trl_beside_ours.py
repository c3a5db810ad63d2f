"""Updates of TRL's trainer beside those of our own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_policy
import torch
from torch import Tensor

from paced_fast.data import packing
from paced_fast.data.records import Completion, Rollouts, Targets
from paced_fast.paced.targets import group_accuracy
from paced_fast.paced.update import make_optimizer, update_policy
from paced_fast.policy import Policy

ROOT = Path(__file__).resolve().parents[2]


GROUP = 4


def rollouts_of(batches: list[dict[str, Tensor]], step: int) -> Rollouts:
    """What TRL generated for one step on all processes, in the order of the groups."""
    prompts, completions, rewards = [], [], []
    for batch in batches:
        rows = zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        )
        for prompt, prompt_mask, completion, mask in rows:
            prompts.append(tuple(prompt[prompt_mask.bool()].tolist()))
            ids = completion[mask.bool()].tolist()
            completions.append(Completion(token_ids=ids, logprobs=[0.0] * len(ids), stopped=True))
        rewards += batch["rewards"].tolist()
    index = [i // GROUP for i in range(len(prompts))]
    return packing.pack(completions, prompts, index, rewards, step, tiny_policy.CPU)


def our_parameters(batches: list[list[dict[str, Tensor]]], model: Any = None) -> dict[str, Tensor]:
    """Parameters after our trainer's updates on the rollouts of every step."""
    config = tiny_policy.settings(
        "tb_group",
        optimizer__learning_rate=1e-2,
        optimizer__warmup_steps=0,
        optimizer__decay="none",
        optimizer__weight_decay=0.0,
        optimizer__minibatches=1,
        optimizer__epochs=1,
        optimizer__max_grad_norm=1.0,
    )
    assert (config.loss.beta, config.loss.importance_cap) == (0.05, 1.28)
    policy = Policy(tiny_policy.model(sharpness=2.0) if model is None else model, max_tokens=4096)
    optimizer = make_optimizer(policy, config.optimizer)
    for step, of_step in enumerate(batches):
        rollouts = rollouts_of(of_step, step)
        old = policy.logprobs(rollouts, config.generation.temperature)
        scored = torch.tensor(rollouts.scored)
        mean = group_accuracy(rollouts.rewards, scored, GROUP).repeat_interleave(GROUP)
        targets = Targets(
            signal=rollouts.rewards,
            intercept=mean,
            old_logprobs=old,
            ref_logprobs=old,
            weights=torch.ones_like(mean),
        )
        update_policy(policy, optimizer, rollouts, targets, config, step=step, num_updates=step)
    return {name: p.detach() for name, p in policy.model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # Three steps of Adam at 1e-2 move weights by up to 3e-2. Attention over left padding in TRL and over packed rows
    # in ours rounds differently, and Adam divides by gradients that are small.
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def launch(folder: Path, *, program: str = "tiny_trl.py", **changes: Any) -> list[dict[str, Any]]:
    """Two gloo processes of `program`; what each wrote."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / program), str(folder), json.dumps(changes)]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
