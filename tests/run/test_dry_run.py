"""A dry run: sizes against models counted one by one, figures against arithmetic done by hand, and nothing started."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import torch
from rich.console import Console
from torch.utils import _device
from transformers import LlamaForCausalLM

from paced_fast import train
from paced_fast.config import ModelConfig, modes
from paced_fast.config.presets import PRESETS, preset
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError
from paced_fast.policy.loading import model_settings, skeleton
from paced_fast.policy.shape import KNOWN, shape_of
from paced_fast.run.plan import devices, dry_run, idle, memory, roofline
from paced_fast.run.plan.devices import DEVICES

pytestmark = pytest.mark.real_empty  # models on the meta device: `torch.device` knows the functions it was given first


@pytest.fixture(autouse=True)
def _own_constructors() -> Iterator[None]:
    """`torch.device` as a context keeps a list of functions; one made while `torch.empty` was replaced lacks it."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    _device._device_constructors.cache_clear()
    yield
    _device._device_constructors.cache_clear()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


PUBLISHED = {
    # Parameters as the safetensors index of each model adds up to.
    "smollm2": 134_515_008,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
}


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a dry run needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def _slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataclasses.replace(DEVICES["4090"], name="cpu", float32_flops=1e11, capability=None)
    monkeypatch.setattr(devices, "measured_cpu", lambda dtype: made)


@pytest.mark.usefixtures("_no_network", "_slow_cpu")
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_planned_without_network_or_run_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    train.main([name, "--dry-run", "8"])  # no SystemExit: status 0
    text = capsys.readouterr().out
    expected = {"tiny": 224_928, "small": 2_251_200}.get(name) or PUBLISHED[preset(name).model.name]
    if preset(name).lora.rank:  # 28 layers; q and o, k and v, gate, up and down of Qwen2.5-1.5B
        expected += 28 * preset(name).lora.rank * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert f" {expected:,} parameters" in text
    for words in ("8 on 1 machine", "memory plan (GiB)", "estimated time per step", "old_logprobs", "assumed:"):
        assert words in text
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_known_sizes_are_those_of_the_models() -> None:
    for name, parameters in PUBLISHED.items():
        shape = shape_of(skeleton(model_settings(ModelConfig(name=name), 0)))
        assert shape.parameters == parameters, name
        assert shape.body_parameters < parameters - shape.head_parameters + 1
    assert set(KNOWN) == set(PUBLISHED)
    assert {preset(name).model.name for name in PRESETS} <= {*KNOWN, "tiny"}


def test_a_shape_counts_what_its_model_has() -> None:
    model = tiny_policy.model()  # two layers of width 16, inner width 24, two heads, 11 tokens, untied
    assert isinstance(model, LlamaForCausalLM)
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    shape = shape_of(model)
    assert (shape.parameters, shape.largest_layer) == (2 * layer + 16 + 2 * 11 * 16, layer)
    assert shape.body_parameters == 2 * layer + 16
    assert shape.kv_numbers == 2 * 2 * 16
    model.lm_head.weight.requires_grad_(False)
    assert shape_of(model).trainable == shape.parameters - 11 * 16


def test_the_sizes_of_tiny_are_its_settings() -> None:
    settings = preset("tiny").model
    shape = shape_of(skeleton(model_settings(settings, 17)))
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (settings.num_layers, settings.hidden_size, 17)


def test_a_folder_is_read_and_an_unknown_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_policy.model().config.save_pretrained(tmp_path / "model")
    assert model_settings(ModelConfig(name=str(tmp_path / "model")), 0).hidden_size == 16
    with pytest.raises(InputError, match="its configuration cannot be read") as error:
        model_settings(ModelConfig(name=str(tmp_path / "nothing")), 0)
    assert "\n" not in str(error.value)


def test_bytes_of_a_rank_by_hand() -> None:
    """1000 parameters in bfloat16: 2 B weight, 4 B gradient, 8 B moments and 4 B master each."""
    config = tiny_policy.replaced(tiny_policy.settings(), model__dtype="bfloat16")
    shape = dataclasses.replace(
        shape_of(tiny_policy.model()), parameters=1000, trainable=1000, largest_layer=100, vocab_size=2, hidden_size=10
    )

    def held(**where: Any) -> list[int]:
        return list(memory.training_bytes(shape, config, memory.Layout(**where)).values())

    assert held() == [2000, 4000, 8000, 4000]
    assert held(ranks=4) == [2000, 4000 + 1000, 2000, 1000], "weights and gradients everywhere, the rest shared"
    # Of whole gradients only the head's 2 * 10 and a layer's 100 numbers are held, with a quarter of their sum.
    assert held(ranks=4, gradients="split") == [2000, 4 * (120 + 30) + 1000, 2000, 1000]
    assert held(gradients="split") == held(), "one rank has all of them"
    gathered = (2 + 4) * (2 * 20 + 2 * 100)
    assert held(ranks=4, mode="sharded") == [1000, 1000, 2000, gathered], "the shards are the masters"
    assert held(ranks=8, nodes=2, mode="sharded") == [1000, 1000, 2000, gathered], "split within a machine"
    float32 = tiny_policy.settings()
    assert list(memory.training_bytes(shape, float32, memory.Layout()).values()) == [4000, 4000, 8000]
    adapters = dataclasses.replace(shape, trainable=10)
    assert list(memory.training_bytes(adapters, config, memory.Layout()).values()) == [2000, 40, 80, 40]


def test_auto_replicates_where_the_plan_fits_and_says_why() -> None:
    big, small = (dry_run.make_plan(preset("qwen_math_7b"), ranks=4, device=name) for name in ("h200", "a100"))
    assert (big.layout.mode, big.layout.shards) == ("replicated", 1)
    assert (big.layout.gradients, small.layout.gradients) == ("split", "split")
    assert (small.layout.mode, small.layout.shards) == ("replicated", 1)
    assert small.why.startswith("replicated, with split gradients: all parameters and 1/4 of gradients and optimiser's")
    assert (big.recompute[:4], small.recompute[:4]) == ("off:", "on: ")
    assert sum(memory.at_a_time(small.parts).values()) < 67 << 30
    least = dry_run.make_plan(preset("qwen_math_7b"), ranks=4, device="l40s")
    assert (least.layout.mode, least.layout.shards) == ("sharded", 4)
    assert "sharded: all parameters and 1/4 of gradients and optimiser's state need " in least.why
    assert "more than 37.4 GiB, 85% of the device's memory" in least.why
    told = dry_run.make_plan(tiny_policy.replaced(preset("qwen_math_7b"), distributed__mode="sharded"), ranks=4)
    assert told.layout.mode == "sharded"
    assert dry_run.make_plan(preset("qwen_math_7b"), ranks=1, device="4090").layout.mode == "replicated"


def test_a_dry_run_shows_how_many_sequences_are_decoded_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """1024 sequences of a step on one H200: in one wave instead of four, in less time."""
    base = preset("qwen_math_1_5b")
    plans = [
        dry_run.make_plan(tiny_policy.replaced(base, generation__max_batch_sequences=most), ranks=1, device="h200")
        for most in (0, 256)
    ]
    for plan, at_once, limit in zip(plans, (1024, 256), (1024, 256), strict=True):
        dry_run.show(plan, Console(width=200))
        text = capsys.readouterr().out
        assert f"1024 sequences per rank, {at_once} at once (up to {limit} by vllm's limit)" in text
    assert plans[0].seconds["generate"] < plans[1].seconds["generate"]


def test_a_dry_run_shows_what_the_queue_saves(capsys: pytest.CaptureFixture[str]) -> None:
    plan = dry_run.make_plan(preset("qwen3_4b"), ranks=2, device="h100")
    dry_run.show(plan, Console(width=300))
    text = capsys.readouterr().out
    found = idle.shares(plan.config, 2, roofline.decoded_at_once(plan.shape, plan.config, plan.layout))
    assert (
        f"idle for {found['queue']:.1%} of it with prompts from a shared queue, {found['parts']:.1%} with equal" in text
    )
    assert found["queue"] < found["parts"]
    assert "idle" not in dry_run._generation(dry_run.make_plan(preset("qwen3_4b"), ranks=1, device="h100"))


def test_embeddings_of_prompts_are_shared_out() -> None:
    """40 prompts of 12 tokens, 2 operations a parameter of the body; half of 1e9 operations a second."""
    shape, slow = shape_of(tiny_policy.model()), dataclasses.replace(DEVICES["h100"], float32_flops=1e9)
    config = tiny_policy.settings()
    for ranks in (1, 4):
        found = roofline.embedding_seconds(shape, config, memory.Layout(ranks=ranks), slow, 40)
        assert found == pytest.approx(40 * 12 * 2 * shape.body_parameters / 0.5e9 / ranks)
    assert roofline.embedding_seconds(shape, tiny_policy.settings("grpo"), memory.Layout(), slow, 40) == 0.0


def test_what_is_held_at_a_time_by_hand() -> None:
    parts = {"weights": 10, "gradients": 4, "activations of a micro-batch": 5, "key-value cache": 7, "replay": 1}

    def held(**more: int) -> int:
        return sum(memory.at_a_time(parts | {name.replace("_", " "): size for name, size in more.items()}).values())

    assert held() == 10 + 1 + 9
    assert held(**{"key-value cache": 12}) == 10 + 1 + 12
    assert held(**{"the engine's own weights, if not shared": 50}) == 20
    assert held(**{"the engine's own weights": 50}) == 70
    assert held(**{"the engine's own weights, asleep while the policy trains": 50}) == 10 + 1 + 57


def test_a_copy_of_the_engine_counts_where_it_is_certain() -> None:
    config = tiny_policy.settings(generator="vllm")
    shape = shape_of(tiny_policy.model())
    weights = 4 * shape.parameters
    for mode, sharded, name in (
        ("auto", False, "the engine's own weights, if not shared"),
        ("push", False, "the engine's own weights"),
        ("auto", True, "the engine's own weights"),
    ):
        chosen = tiny_policy.replaced(config, weight_sync__mode=mode)
        layout = memory.Layout(ranks=2, mode="sharded" if sharded else "replicated")
        assert memory.plan(shape, chosen, 1, layout)[name] == weights
    shared = tiny_policy.replaced(config, weight_sync__mode="shared")
    assert not [name for name in memory.plan(shape, shared, 1) if "engine" in name]


def test_operations_of_a_forward_pass_by_hand() -> None:
    # One prompt of 12, eight completions of 13, all in one row: 116 tokens that each look at the whole row.
    config = tiny_policy.settings(generation__prompts_per_step=1, generation__group_size=8, optimizer__minibatches=1)
    shape = shape_of(tiny_policy.model())
    body = 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    attention = 4 * 2 * 16 * 116
    expected = 116 * (2 * body + attention) + 104 * 2 * 11 * 16
    assert roofline.forward_flops(shape, roofline.step_work(config)) == expected
    # Rows of 40 tokens have room for two completions: the prompt is read four times, and a token sees 38.
    short = tiny_policy.replaced(config, optimizer__micro_batch_tokens=40)
    assert roofline.step_work(short) == roofline.Work(row_tokens=4 * 12 + 104, completion_tokens=104, seen=38.0)


def test_seconds_follow_the_device_and_the_ranks() -> None:
    config = tiny_policy.settings(generation__prompts_per_step=1, generation__group_size=8, optimizer__minibatches=1)
    shape = shape_of(tiny_policy.model())
    slow = dataclasses.replace(DEVICES["h100"], float32_flops=1e9, memory_bandwidth=1e30, link_bandwidth=1e30)
    forward = roofline.forward_flops(shape, roofline.step_work(config))
    seconds = roofline.estimate(shape, config, memory.Layout(), slow)
    # Old log-probs come from the states of the only optimiser step: its 104 tokens are projected once more.
    assert seconds["old_logprobs"] == 0.0
    assert seconds["update"] == pytest.approx((3 * forward + 104 * 2 * 11 * 16) / 0.5e9)
    # Of four optimiser steps the first has them, and three quarters are scored before.
    config = tiny_policy.replaced(config, generation__prompts_per_step=4, optimizer__minibatches=4)
    forward = roofline.forward_flops(shape, roofline.step_work(config))
    seconds = roofline.estimate(shape, config, memory.Layout(), slow)
    assert seconds["old_logprobs"] == pytest.approx(0.75 * forward / 0.5e9)
    assert seconds["update"] == pytest.approx((3 * forward + 104 * 2 * 11 * 16) / 0.5e9)
    two = roofline.estimate(shape, config, memory.Layout(ranks=2), slow)
    assert two["old_logprobs"] == pytest.approx(seconds["old_logprobs"] / 2)
    assert "exchange between ranks" in two
    # A reference that is kept is computed beside the old log-probs, and is no part of the update.
    kept = roofline.estimate(shape, dataclasses.replace(config, algorithm="flowrl"), memory.Layout(), slow)
    assert kept["old_logprobs"] == pytest.approx(1.75 * forward / 0.5e9)
    assert kept["update"] == seconds["update"]
    # Decoding is bound by memory: 13 passes that read all weights, and keys and values of 8 sequences of 18.5 tokens.
    config = tiny_policy.replaced(config, generation__prompts_per_step=1, optimizer__minibatches=1)
    narrow = dataclasses.replace(slow, float32_flops=1e30, memory_bandwidth=1e6)
    read = 4 * (shape.body_parameters + shape.head_parameters + 8 * 18.5 * shape.kv_numbers)
    assert roofline.generation_seconds(shape, config, memory.Layout(), narrow) == pytest.approx(13 * read / 0.7e6)


def test_ranks_that_do_not_fill_the_machines_are_refused() -> None:
    config = preset("qwen_math_1_5b")
    with pytest.raises(InputError, match="9 processes cannot be divided evenly among 2 machines"):
        dry_run.make_plan(config, ranks=9)
    with pytest.raises(InputError, match=r"unknown device 'h10': choose from h100, "):
        dry_run.make_plan(config, ranks=1, device="h10")
    with pytest.raises(InputError, match=r"--dry-run-device cpu does not match --model.device cuda"):
        dry_run.make_plan(config, ranks=1, device="cpu")


def test_an_engine_over_ranks_that_are_not_there_is_refused_as_a_run_would() -> None:
    config = tiny_policy.replaced(preset("qwen_math_1_5b"), weight_sync__tensor_parallel=2, weight_sync__mode="push")
    assert dry_run.make_plan(config, ranks=4, device="h100").layout.ranks == 4
    with pytest.raises(InputError, match=r"tensor-parallel 2 needs .* has --generator vllm and 3 ranks"):
        dry_run.make_plan(config, ranks=3, device="h100")
    plain = tiny_policy.replaced(config, generator="transformers")
    with pytest.raises(InputError, match=r"has --generator transformers and 4 ranks"):
        dry_run.make_plan(plain, ranks=4, device="h100")


def test_an_environment_of_no_number_of_processes_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny", "--dry-run"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: --dry-run: WORLD_SIZE is 'two', not a number of processes: give --dry-run RANKS\n"
    )


def test_the_cpu_is_measured() -> None:
    found = devices.measured_cpu("float32")
    assert 1e9 < found.float32_flops < 1e14
    assert 1e8 < found.memory_bandwidth < 1e13


MISTAKES = [
    (["--dry-run", "many"], "--dry-run 'many' is not a whole number from 1 to 100000"),
    (["--dry-run=0"], "--dry-run '0' is not a whole number from 1 to 100000"),
    (["--bench", "-1"], "--bench '-1' is not a whole number from 1 to 100000"),
    (["--dry-run", "--bench"], "--dry-run and --bench exclude each other: give one of them"),
    (["--bench", "--replay-rollouts", "x"], "--bench and --replay-rollouts exclude each other: give one of them"),
    (["--bench", "--bench"], "--bench is given twice: give it once"),
    (["--replay-rollouts"], "--replay-rollouts needs a value"),
    (["--bench-json", "x"], "--bench-json works only with --bench: give that too"),
    (["--dry-run-nodes", "2"], "--dry-run-nodes works only with --dry-run: give that too"),
    (["--bench", "--bench-lengths", "evn"], "--bench-lengths 'evn': did you mean even? the choices are full, even"),
    (["--dry-rum"], "unknown option --dry-rum: did you mean --dry-run?"),
]


@pytest.mark.parametrize(("words", "complaint"), MISTAKES, ids=lambda value: " ".join(value)[:30])
def test_modes_that_make_no_sense_are_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"


def test_modes_are_taken_from_anywhere_and_the_rest_is_left() -> None:
    mode, rest = modes.take(["tiny", "--steps", "3", "--bench_json", "out", "--bench", "--loss.beta", "1"])
    assert rest == ["tiny", "--steps", "3", "--loss.beta", "1"]
    assert (mode.bench, mode.json, mode.lengths, mode.dry_run) == (5, Path("out"), "full", None)
    mode, rest = modes.take(["--dry-run=16", "--dry-run-device", "h200", "--dry-run-nodes", "2"])
    assert (mode.dry_run, mode.device, mode.nodes, rest) == (16, "h200", 2, [])
    assert modes.take(["tiny"]) == (modes.Launch(), ["tiny"])


def test_help_names_the_modes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in modes.NAMES)


def test_the_adapters_fit_24_gb() -> None:
    plan = dry_run.make_plan(preset("qwen_math_1_5b_lora"), ranks=1, device="4090")
    assert sum(memory.at_a_time(plan.parts).values()) < 20 << 30
    assert plan.parts["key-value cache"] == 8 << 30
    whole = dry_run.make_plan(preset("qwen_math_1_5b"), ranks=1, device="4090")
    assert sum(memory.at_a_time(whole.parts).values()) > 24 << 30


def test_packed_rows_and_layers_computed_again_by_hand() -> None:
    config = tiny_policy.settings(generation__prompts_per_step=1, generation__group_size=8, optimizer__minibatches=1)
    shape = shape_of(tiny_policy.model())  # two layers of width 16, inner width 24
    packed = tiny_policy.replaced(config, model__attention="packed-torch", model__device="cuda")
    layout = memory.Layout(capability=(9, 0))
    # Eight rows of a prompt of 12 and a completion of 13; a token sees half of its row.
    assert roofline.step_work(packed) == roofline.Work(row_tokens=200, completion_tokens=104, seen=12.5)
    parts = memory.plan(shape, packed, 1, layout)
    assert parts["attention mask of a micro-batch"] == 0
    assert parts["activations of a micro-batch"] == 200 * 2 * (17 * 16 + 4 * 24) * 4
    again = tiny_policy.replaced(packed, model__gradient_checkpointing="on")
    parts = memory.plan(shape, again, 1, layout)
    assert parts["activations of a micro-batch"] == 200 * (2 * 16 + 17 * 16 + 4 * 24) * 4
    shared = memory.plan(shape, config, 1)
    assert shared["attention mask of a micro-batch"] == 116 * 116 * (4 + 2)
    fast = dataclasses.replace(DEVICES["h100"], memory_bandwidth=1e30)
    once, twice = (roofline.estimate(shape, each, layout, fast)["update"] for each in (packed, again))
    forward, again_projected = roofline.forward_flops(shape, roofline.step_work(packed)), 104 * 2 * 11 * 16
    assert twice / once == pytest.approx((4 * forward + again_projected) / (3 * forward + again_projected))


def test_what_does_not_fit_the_cache_waits() -> None:
    config = tiny_policy.settings(
        generator="vllm", generation__prompts_per_step=1, generation__group_size=8, optimizer__minibatches=1
    )
    shape = shape_of(tiny_policy.model())
    slow = dataclasses.replace(DEVICES["h100"], float32_flops=1e30, memory_bandwidth=1e6)
    seconds = [
        roofline.generation_seconds(
            shape, tiny_policy.replaced(config, weight_sync__kv_cache_gib=gib), memory.Layout(), slow
        )
        for gib in (1.0, 4 * 18.5 * 64 * 4 / 2**30 + 1e-9)  # room for all eight, and for four
    ]
    weights = 4 * (shape.body_parameters + shape.head_parameters)
    each = 4 * 18.5 * shape.kv_numbers
    assert seconds[0] == pytest.approx(13 * (weights + 8 * each) / 0.7e6)
    assert seconds[1] == pytest.approx(2 * 13 * (weights + 4 * each) / 0.7e6)


def test_every_gpu_preset_resolves_for_a_machine_without_vllm() -> None:
    for name in PRESETS:
        config = resolve(preset(name))
        assert config.optimizer.micro_batch_tokens >= config.data.max_prompt_tokens
