"""A CPU computes in float32 what the settings call float32, whatever the processor's units for smaller types."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_policy
import tiny_run
import torch

from paced_fast.config.presets import PRESETS, preset
from paced_fast.config.resolve import resolve
from paced_fast.errors import InputError
from paced_fast.evaluate import EvaluateArguments, evaluate_target
from paced_fast.run.plan.devices import require_float32_products
from paced_fast.run.start.resume import _check_same_run

ROOT = Path(__file__).resolve().parents[2]

PRODUCTS = """
import hashlib, json, sys
import torch
from paced_fast.config.presets import PRESETS, preset
from paced_fast.config.resolve import resolve
from paced_kernels import linear_logprobs

torch.set_num_threads(1)
found = {}
for name in PRESETS:
    config = resolve(preset(name))
    if config.model.device != "cpu":
        continue
    assert config.model.dtype == "float32"
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    source = torch.Generator().manual_seed(0)
    error, bits = 0.0, hashlib.sha256()
    for rows, inner, columns in ((3, 17, 5), (64, 64, 64), (257, 576, 1536)):
        left, right = torch.randn(rows, inner, generator=source), torch.randn(inner, columns, generator=source)
        wanted = left.double() @ right.double()
        layer = torch.nn.functional.linear(left, right.T, torch.ones(columns)) - 1.0
        for product in (left @ right, torch.bmm(left[None], right[None])[0], layer):
            error = max(error, float((product - wanted).abs().max() / wanted.abs().max()))
            bits.update(product.numpy().tobytes())
        ids = torch.arange(rows) % columns
        scale = inner ** -0.5
        logprobs = linear_logprobs(left, right.T.contiguous() * scale, ids)
        exact = (wanted * scale).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        error = max(error, float((logprobs - exact).abs().max() / exact.abs().max()))
        bits.update(logprobs.numpy().tobytes())
    found[name] = error, bits.hexdigest()
sys.stdout.write(json.dumps(found))
"""


def products(**environment: str) -> dict[str, Any]:
    """By preset of a CPU: largest relative error of products and log-probs, and a hash of them all."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    given = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.process
def test_presets_of_a_cpu_give_the_same_numbers_with_and_without_its_units_for_smaller_types() -> None:
    narrow, widest = products(ONEDNN_MAX_CPU_ISA="AVX2"), products(ONEDNN_MAX_CPU_ISA="DEFAULT")
    assert set(widest) == {"tiny", "small", "smollm2"}
    for name, (error, bits) in widest.items():
        assert 0 < error < 1e-6
        assert narrow[name] == [error, bits]


@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).model.placed().device == "cpu"])
def test_a_precision_that_depends_on_the_processor_is_refused_on_a_cpu(name: str, precision: str) -> None:
    config = tiny_policy.replaced(preset(name), model__matmul_precision=precision)
    with pytest.raises(InputError, match=f"--model.matmul-precision {precision} rounds .*: give highest") as raised:
        resolve(config)
    assert "\n" not in str(raised.value)
    tiny_policy.replaced(config, model__device="cuda", model__matmul_precision=precision)


def rounded(plain: Any) -> Any:
    """What a unit for bfloat16 does to float32 inputs: they are rounded, sums are not."""
    return lambda a, b: plain(a.bfloat16().float(), b.bfloat16().float())


@pytest.mark.parametrize("owner_and_name", [(torch, "mm"), (torch, "bmm"), (torch.nn.functional, "linear")])
def test_a_cpu_that_rounds_in_one_kind_of_product_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner_and_name: tuple[Any, str]
) -> None:
    require_float32_products()
    owner, name = owner_and_name
    monkeypatch.setattr(owner, name, rounded(getattr(owner, name)))
    with pytest.raises(InputError, match=r"have errors of \de-03, .* unset ONEDNN_DEFAULT_FPMATH_MODE") as raised:
        require_float32_products()
    assert "\n" not in str(raised.value)


def test_a_run_and_an_evaluation_ask_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_run.config(tiny_run.write_rewards(tmp_path))
    monkeypatch.setattr(torch, "mm", rounded(torch.mm))
    with pytest.raises(InputError, match="float32 matrix products on this CPU"):
        tiny_run.build(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = tiny_policy.model()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="float32 matrix products on this CPU"):
        evaluate_target(EvaluateArguments(run_or_model=str(tmp_path / "model"), data=("rg:chain_sum?size=4",)))


def test_a_run_of_such_a_precision_says_why_it_is_not_resumed(tmp_path: Path) -> None:
    config = resolve(preset("smollm2"))
    old = dataclasses.replace(config, model=dataclasses.replace(config.model, matmul_precision="medium"))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(old)))
    wanted = "--resume auto: .* was trained with settings that this version refuses: --model.matmul-precision medium"
    with pytest.raises(InputError, match=wanted):
        _check_same_run(config, tmp_path)
