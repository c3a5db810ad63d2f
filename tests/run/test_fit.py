"""What a run spends memory on: the fastest way that fits, from limits on either side of what each way needs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny_families
import tiny_policy
import torch

from paced_fast.config import Config
from paced_fast.config.saved import config_from_dict
from paced_fast.errors import InputError
from paced_fast.policy import Policy, choose_attention
from paced_fast.policy.gradient_checkpointing import can_recompute
from paced_fast.policy.shape import shape_of
from paced_fast.run.plan import fit, memory, roofline
from paced_fast.run.plan.devices import DEVICES


def settings(**changes: Any) -> Config:
    """A long micro-batch on a GPU: its activations outweigh the gradients, and those the parameters' shards."""
    return tiny_policy.settings(
        model__device="cuda",
        model__attention="packed-torch",
        generation__prompts_per_step=1,
        optimizer__minibatches=1,
        **changes,
    )


SHAPE = shape_of(tiny_policy.model())
SPEED = [  # from the fastest to the slowest, on one machine
    ("replicated", "whole", "off"),
    ("replicated", "split", "off"),
    ("replicated", "whole", "on"),
    ("replicated", "split", "on"),
    ("sharded", "split", "off"),
    ("sharded", "split", "on"),
]


def needed(config: Config, way: tuple[Any, Any, Any], ranks: int) -> int:
    mode, gradients, recompute = way
    chosen = tiny_policy.replaced(config, model__gradient_checkpointing=recompute)
    layout = memory.Layout(ranks=ranks, mode=mode, gradients=gradients, capability=(9, 0))
    return sum(memory.at_a_time(memory.plan(SHAPE, chosen, 1, layout)).values())


def chosen(config: Config, device_bytes: int, ranks: int, **layout: Any) -> tuple[Any, fit.Fit]:
    where = memory.Layout(ranks=ranks, device_bytes=device_bytes, capability=(9, 0), **layout)
    found = fit.choose(config, SHAPE, 1, where)
    return (found.layout.mode, found.layout.gradients, found.config.model.gradient_checkpointing), found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_fastest_way_that_fits_is_taken(ranks: int) -> None:
    config = settings()
    sizes = {way: needed(config, way, ranks) for way in SPEED}
    edges = sorted({int(size / 0.85) + extra for size in sizes.values() for extra in (-2, 2)})
    taken = []
    for device_bytes in edges:
        limit = int(0.85 * device_bytes)
        wanted = next((way for way in SPEED if sizes[way] <= limit), SPEED[-1])
        taken.append(wanted)
        assert chosen(config, device_bytes, ranks)[0] == wanted
    assert len(set(taken)) >= 3, "several ways are taken between the edges"
    assert chosen(config, 1 << 50, ranks)[0] == SPEED[0]


def test_what_the_settings_say_is_not_chosen() -> None:
    ways = (("replicated", "whole"), ("replicated", "split"), ("sharded", "split"), ("sharded", "auto"))
    for (mode, gradients), recompute in itertools.product(ways, ("on", "off")):
        config = settings(
            distributed__mode=mode, distributed__gradients=gradients, model__gradient_checkpointing=recompute
        )
        for device_bytes in (1, 1 << 50):
            way, found = chosen(config, device_bytes, 2)
            assert way == (mode, gradients if mode == "replicated" else "split", recompute)
            assert found.mode.startswith(f"{mode}, as --distributed.mode says")
            assert found.recompute == f"{recompute}, as --model.gradient-checkpointing says"


def test_one_rank_splits_nothing_and_a_cpu_computes_nothing_again() -> None:
    assert chosen(settings(), 1 << 50, 1)[0] == ("replicated", "whole", "off")
    way, found = chosen(settings(), 1, 1)
    assert way == ("replicated", "whole", "on")
    assert found.mode == "replicated: one process holds everything"
    assert found.recompute.startswith("on: without it a rank needs 0.0 GiB, more than 0.0 GiB, 85% of the device's mem")
    host = tiny_policy.settings()
    assert chosen(host, 1, 1)[0] == ("replicated", "whole", "off")
    assert chosen(tiny_policy.replaced(host, model__gradient_checkpointing="on"), 1 << 50, 1)[0][2] == "on"
    plain = fit.choose(settings(), SHAPE, 1, memory.Layout(device_bytes=1, capability=(9, 0)), can_recompute=False)
    assert plain.config.model.gradient_checkpointing == "off"
    assert plain.recompute == "off: this model has no layers that can be computed again"


def test_between_machines_another_forward_pass_comes_before_an_exchange_per_micro_batch() -> None:
    config = settings()
    limit = max(needed(config, ("replicated", "split", "off"), 4), needed(config, ("replicated", "whole", "on"), 4))
    assert limit < needed(config, SPEED[0], 4)
    assert chosen(config, int(limit / 0.85) + 2, 4)[0] == ("replicated", "split", "off")
    assert chosen(config, int(limit / 0.85) + 2, 4, nodes=2)[0] == ("replicated", "whole", "on")


def test_split_gradients_cost_an_exchange_per_micro_batch() -> None:
    """Four micro-batches of a rank: 4 x 4 bytes of gradients and 4 of gathered parameters, instead of 8 in all."""
    config = settings(generation__group_size=16, optimizer__micro_batch_tokens=25)
    assert roofline.step_work(config).row_tokens == 400
    seconds = [
        roofline.estimate(SHAPE, config, memory.Layout(ranks=4, gradients=kind), DEVICES["h100"])[
            "exchange between ranks"
        ]
        for kind in ("whole", "split")
    ]
    assert seconds[1] / seconds[0] == pytest.approx((4 * 4 + 4) / 8)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_layers_keep_is_within_the_plan(family: str) -> None:
    """Bytes of the tensors that autograd keeps, without parameters: two layers, less what one keeps."""
    kept = []
    for layers in (1, 2):
        made = tiny_families.model(family, num_hidden_layers=layers)
        policy = Policy(made, max_tokens=4096, attention=choose_attention("packed-sdpa", made))
        own = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
        found: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, found: dict[int, Any] = found) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        batch = tiny_policy.rollouts([40, 30, 50], prompt_lengths=(3,))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.hidden(batch)
        kept.append(sum(size for size, _ in found.values()))
    shape = shape_of(made)
    tokens = 120 + 3 * 5 - 3  # a completion's last token is predicted and not read
    heads = shape.num_heads * shape.head_size
    planned = tokens * (8 * shape.hidden_size + 9 * heads + 4 * shape.intermediate_size) * 4
    assert 0.5 * planned < kept[1] - kept[0] <= planned
    assert can_recompute(made)


def test_a_switch_of_an_older_run_is_on_or_off() -> None:
    for old, new in ((True, "on"), (False, "off")):
        assert config_from_dict(Config, {"model": {"gradient_checkpointing": old}}).model.gradient_checkpointing == new
    with pytest.raises(InputError, match=r"distributed.mode is true, not one of auto, replicated, sharded"):
        config_from_dict(Config, {"distributed": {"mode": True}})
