"""The memory plan against tensors counted one by one."""

from __future__ import annotations

import dataclasses
import mmap

import pytest
import tiny_policy
import torch

from paced_fast.config.presets import preset
from paced_fast.config.resolve import resolve
from paced_fast.policy import attention
from paced_fast.policy.shape import shape_of
from paced_fast.run.plan import memory
from paced_fast.run.record.phases import probe
from paced_kernels import default_workspace_bytes


def test_plan_counts_weights_gradients_and_the_vocabulary_head() -> None:
    model = tiny_policy.model()
    config = resolve(preset("tiny"))
    plan = memory.plan(shape_of(model), config, 100)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert plan["weights"] == plan["gradients"] == weights
    assert plan["optimizer (AdamW, two moments)"] == 2 * weights
    workspace = default_workspace_bytes(1, tiny_policy.VOCAB, torch.float32, torch.device("cpu"))
    head = plan["vocabulary head (workspace, float32 gradient)"]
    assert head == workspace + 4 * tiny_policy.VOCAB * 16
    assert plan["prompt embeddings"] == 100 * 2 * 16 * 2, "the mean and the last token, in bfloat16"
    model.lm_head.weight.requires_grad_(False)
    frozen = memory.plan(shape_of(model), config, 100)
    assert frozen["gradients"] == weights - tiny_policy.VOCAB * 16 * 4


def test_flowrl_holds_a_second_copy_of_the_weights() -> None:
    model = tiny_policy.model()
    config = resolve(dataclasses.replace(preset("tiny"), algorithm="flowrl"))
    plan = memory.plan(shape_of(model), config, 1)
    assert plan["reference policy"] == plan["weights"]


def test_packed_rows_have_no_mask_and_layers_computed_again_keep_their_input() -> None:
    shape = shape_of(tiny_policy.model())
    config = tiny_policy.replaced(resolve(preset("tiny")), model__device="cuda")
    again = tiny_policy.replaced(config, model__gradient_checkpointing="on")
    layout = memory.Layout(capability=(9, 0))
    full, little = (memory.plan(shape, each, 1, layout) for each in (config, again))
    name = "activations of a micro-batch"
    layer = 17 * 16 + 4 * 24
    assert little[name] * 2 * layer == full[name] * (2 * 16 + layer)
    assert full["attention mask of a micro-batch"] == 0


def test_long_rows_on_a_cpu_have_no_mask_of_their_length() -> None:
    shape, config = shape_of(tiny_policy.model()), resolve(preset("tiny"))
    name = "attention mask of a micro-batch"
    longer = tiny_policy.replaced(config, generation__max_completion_tokens=4000)
    tokens = min(longer.optimizer.micro_batch_tokens, memory.step_tokens(longer))
    assert memory.plan(shape, longer, 1)[name] == tokens * attention.MASKED_ROW * 6
    assert 0 < memory.plan(shape, config, 1)[name] < tokens * attention.MASKED_ROW * 6


def test_memory_held_is_told_while_it_is_held() -> None:
    held = probe(torch.device("cpu"))
    if held is None:
        pytest.skip("needs /proc/self/statm")
    before = held()
    block = mmap.mmap(-1, 64 << 20)  # pages of its own: an allocator may have memory left from tests before
    block.write(b"x" * (64 << 20))
    assert held() - before > 60 << 20
    block.close()
    assert held() - before < 30 << 20
