"""The verl adapter: found by verl, equal to a second writing of its losses, and strict about what it is handed.

Without verl the same functions run against a host of recorded signatures (verl 0.9.1), so the formulas are tested
everywhere; what needs verl itself skips.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paced_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MODULE = "paced_fast.integrations.verl"


class Settings(types.SimpleNamespace):
    """verl's BaseConfig reads like a dictionary too."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def actor(**changes: Any) -> Settings:
    """What a loss reads of verl's ActorConfig."""
    fields = {
        "policy_loss": Settings(dro_beta=0.2),
        "clip_ratio_high": 0.28,
        "entropy_coeff": 0,
        "use_kl_loss": False,
        "global_batch_info": {},
    }
    return Settings(**{**fields, **changes})


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module with `register_*` recorded instead of verl's, whether verl is there or not."""
    registered: dict[str, Callable[..., Any]] = {}

    def register(name: str) -> Callable[[Any], Any]:
        def decorator(function: Any) -> Any:
            registered[name + "/" + function.__name__] = function
            return function

        return decorator

    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.register_policy_loss = core.register_adv_est = register  # pyright: ignore
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module: Any = importlib.import_module(MODULE)
    module.registered = registered
    yield module
    sys.modules.pop(MODULE, None)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Six responses of different lengths in verl's padded layout, two groups of three, garbage in the padding."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 7, 1, 5, 2, 7])
    mask = (torch.arange(7) < lengths[:, None]).long()
    old = -3 * torch.rand(6, 7, generator=source)
    log_prob = old + 0.6 * (torch.rand(6, 7, generator=source) - 0.5)
    rewards = torch.zeros(6, 7)
    rewards[torch.arange(6), lengths - 1] = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0])
    return {"mask": mask, "old": old, "log_prob": log_prob.requires_grad_(), "rewards": rewards}


def formula(data: dict[str, Tensor], *, mean: bool, beta: float, cap: float, denominator: float) -> Tensor:
    """float64, one response at a time; log Z is the group's mean reward."""
    total = torch.zeros((), dtype=torch.float64)
    rewards = data["rewards"].sum(1).double()
    for i in range(6):
        n = int(data["mask"][i].sum())
        ratio = (data["log_prob"][i, :n] - data["old"][i, :n]).double()
        group = rewards[i // 3 * 3 : i // 3 * 3 + 3]
        weight = min(float(ratio.sum().detach().exp()), cap)
        value = beta * (ratio.mean() if mean else ratio.sum())
        total = total + weight * (group.mean() + value - rewards[i]) ** 2 / (2 * beta)
    return total / denominator


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "global_batch_size": 32, "batch_num_tokens": 99}])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_formula(adapter: Any, mode: str, info: dict[str, Any], seed: int) -> None:
    data = batch(seed)
    advantages, returns = adapter.group_advantage(
        token_level_rewards=data["rewards"], response_mask=data["mask"], index=list("aaabbb"), config=None
    )
    assert torch.equal(advantages, returns)
    loss, metrics = adapter.policy_loss(
        old_log_prob=data["old"],
        log_prob=data["log_prob"],
        advantages=advantages,
        response_mask=data["mask"].bool(),
        loss_agg_mode=mode,
        config=actor(global_batch_info=info),
        rollout_is_weights=None,
    )
    denominator = 32 / 2 if info else 6
    wanted = formula(data, mean=mode.endswith("mean"), beta=0.2, cap=1.28, denominator=denominator)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(loss, data["log_prob"])
    (expected,) = torch.autograd.grad(wanted, data["log_prob"])
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    ratios = ((data["log_prob"] - data["old"]) * data["mask"]).sum(1)
    assert metrics["actor/ppo_kl"] == pytest.approx(-float(ratios.detach().mean()), rel=1e-4)


def test_flowrl_has_its_scale_its_means_and_its_cap(adapter: Any) -> None:
    data = batch()
    with torch.no_grad():
        data["log_prob"][1, :7] = data["old"][1, :7] + 1.0  # a weight of exp(7), which the cap makes 10
    advantages = torch.tensor([1.2, -0.3, -0.9, 0.7, 0.7, -1.4])[:, None] * data["mask"]
    loss, _ = adapter.flowrl_policy_loss(
        data["old"], data["log_prob"], advantages, data["mask"], config=actor(), rollout_is_weights=None
    )
    terms = []
    for i in range(6):
        n = int(data["mask"][i].sum())
        ratio = data["log_prob"][i, :n] - data["old"][i, :n]
        weight = ratio.sum().detach().exp().clamp(max=10.0)
        terms.append(weight * (ratio.mean() - 15 * advantages[i, 0]) ** 2)
    wanted = torch.stack(terms).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(x, data["log_prob"])[0] for x in (loss, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def call(adapter: Any, data: dict[str, Tensor], **changes: Any) -> Any:
    given = {
        "old_log_prob": data["old"],
        "log_prob": data["log_prob"],
        "advantages": torch.ones(6, 1) * data["mask"],
        "response_mask": data["mask"],
        "config": actor(),
    }
    return adapter.policy_loss(**{**given, **changes})


def test_wrong_use_is_refused(adapter: Any) -> None:
    data = batch()
    with pytest.raises(InputError, match=r"loss_agg_mode=token-mean weights tokens.*seq-mean-token-sum"):
        call(adapter, data, loss_agg_mode="token-mean")
    with pytest.raises(InputError, match=r"advantages differ between tokens.*adv_estimator=paced_tb"):
        call(adapter, data, advantages=data["rewards"])
    with pytest.raises(InputError, match=r"rollout_is_weights differ.*rollout_is=sequence"):
        call(adapter, data, rollout_is_weights=data["old"].exp())
    with pytest.raises(InputError, match="use_kl_loss=False"):
        call(adapter, data, config=actor(use_kl_loss=True))
    given = (data["old"], data["log_prob"], torch.ones(6, 1) * data["mask"], data["mask"])
    for change in ({"use_kl_loss": True}, {"entropy_coeff": 0.1}):
        with pytest.raises(InputError, match="loss_mode=paced_flowrl takes no further loss terms"):
            adapter.flowrl_policy_loss(*given, config=actor(**change))
    with pytest.raises(InputError, match="loss_agg_mode=seq-mean-token-sum: FlowRL averages"):
        adapter.flowrl_policy_loss(*given, loss_agg_mode="seq-mean-token-sum", config=actor())
    with pytest.raises(InputError, match="group 'c' has only one completion"):
        adapter.group_advantage(data["rewards"], data["mask"], index=list("aaabbc"))
    with pytest.raises(InputError, match="needs the batch's uid"):
        adapter.group_advantage(data["rewards"], data["mask"])


def test_sequence_weights_multiply_and_empty_responses_drop_out(adapter: Any) -> None:
    data = batch()
    with torch.no_grad():
        data["log_prob"].copy_(data["old"])
    signal = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    mask = data["mask"].clone()
    mask[5] = 0
    factors = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 9.0])[:, None]
    loss, _ = call(adapter, data, advantages=signal * mask, response_mask=mask, rollout_is_weights=factors.expand(6, 7))
    # 1 * 1 + 0.5 * 4 + 2 * 9 + 1 * 16 over 2 beta = 0.4 and five responses.
    assert loss.item() == pytest.approx(37 / 0.4 / 5, rel=1e-5)


def test_the_names_verl_will_ask_for(adapter: Any) -> None:
    assert set(adapter.registered) == {
        "paced_tb/group_advantage",
        "paced_tb/policy_loss",
        "paced_flowrl/flowrl_policy_loss",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {"verl.plugins": {"paced_fast": MODULE}}


needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl: pip install verl")


def run_program(name: str, tmp_path: Path) -> None:
    """In a process of its own: importing verl starts what it starts."""
    code = ROOT / "tests" / "support" / name
    done = subprocess.run([sys.executable, str(code)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "fine"


@needs_verl
@pytest.mark.slow
def test_verl_finds_it_by_its_entry_point_and_calls_it(tmp_path: Path) -> None:
    found = [p for p in importlib.metadata.entry_points(group="verl.plugins") if p.value == MODULE]
    if not found:
        pytest.skip("paced-fast is not installed: pip install -e .")
    run_program("verl_calls.py", tmp_path)


@needs_verl
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hydra") is None, reason="needs hydra: pip install hydra-core")
def test_verl_composes_the_settings_of_the_docstrings(tmp_path: Path) -> None:
    run_program("verl_config_calls.py", tmp_path)


@needs_verl
@pytest.mark.slow
def test_the_fused_op_equals_verls_torch_backend(tmp_path: Path) -> None:
    run_program("verl_fused_calls.py", tmp_path)
