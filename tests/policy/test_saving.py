"""What is written is the policy: logits of what others read, adapters merged, names, bits, and the user's own files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_stored
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.models import tiny_types
from paced_fast.config import LoraConfig, ModelConfig
from paced_fast.errors import InputError
from paced_fast.export import ExportArguments, export
from paced_fast.policy import (
    PolicyFiles,
    adapt,
    adapter_state,
    check_loads,
    generation_settings,
    has_experts,
    load_model,
    plain_buffers,
    plain_state,
    save_model,
)
from paced_fast.policy.saving import same

LORA = LoraConfig(rank=2, alpha=4)


def read_by_others(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    both: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    found, info = both
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()


def with_weights(made: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of the same settings that has these weights and no adapters."""
    plain = type(made)(made.config)
    plain.load_state_dict(weights, assign=True)
    return plain.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", tiny_stored.KINDS)
def test_an_exported_policy_says_what_the_policy_says(
    tmp_path: Path, kind: str, lora: bool, dtype: torch.dtype
) -> None:
    made = load_model(ModelConfig(dtype="float32"), str(tiny_stored.stored(tiny_stored.model(kind), tmp_path / "base")))
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    before = tiny_stored.logits(made)
    base = {key: tensor.clone().float() for key, tensor in made.state_dict().items()}
    if lora:
        adapt(made, LORA, seed=0)
    folder = tiny_stored.run_of(made, tmp_path / "run", learn=tiny_stored.learn)
    wanted = tiny_stored.logits(made)
    assert float((wanted - before).abs().max()) > 0.1, "something was learned"
    merged, exact = plain_state(made), plain_state(copy.deepcopy(made).float())
    is_chosen = lora and dtype == torch.bfloat16 and has_experts(made)
    if is_chosen:  # a product on its own is rounded otherwise, and may send a token to another expert
        wanted = tiny_stored.logits(with_weights(made, merged))
    name: Any = str(dtype).removeprefix("torch.")
    out = export(ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out"), dtype=name))
    # A merged bfloat16 matrix is rounded once more than a product on its own.
    allowed = 1e-4 if dtype == torch.float32 else (0.3 * float(wanted.std()) if lora and not is_chosen else 0.0)
    for each in (folder, out):
        read = read_by_others(each, dtype)
        for key, tensor in read.state_dict().items():
            # transformers from 5.24 on reads some routers in float32, whatever the file has.
            widened = Version(transformers.__version__) >= Version("5.24") and key.endswith(".gate.weight")
            assert same(tensor.to(merged[key].dtype) if widened else tensor, merged[key]), key
            assert torch.equal(tensor.float(), merged[key].float()), key
            # Two roundings, of the product and of the sum, each by half a unit in the last of 8 or 24 places.
            rounding = torch.finfo(dtype).eps * (exact[key].abs() + (exact[key] - base[key]).abs())
            assert bool(((tensor.float() - exact[key]).abs() <= rounding).all()), key
        assert float((tiny_stored.logits(read) - wanted).abs().max()) <= allowed


def test_numbers_beside_the_weights_are_exported_as_they_are_read(tmp_path: Path) -> None:
    """Bounds of activations, which are no parameters and are rounded with them wherever the folder is read."""
    made = tiny_types.tiny_model("gemma4")
    bounds = [key for key, tensor in plain_buffers(made) if tensor.is_floating_point()]
    tiny_stored.run_of(made, tmp_path / "run", learn=tiny_stored.learn)
    out = export(
        ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out"), dtype="bfloat16")
    )
    read = read_by_others(out, torch.bfloat16).state_dict()
    for key, tensor in plain_state(made).items():
        assert same(read[key], tensor.to(torch.bfloat16)) or (key not in bounds and torch.equal(read[key], tensor)), key
    assert len(bounds) > 4


@pytest.mark.parametrize("kind", tiny_stored.MIXTURES)
def test_every_expert_has_low_rank_matrices_that_are_merged(kind: str) -> None:
    made = tiny_stored.model(kind)
    names = set(made.state_dict())
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    adapt(made, LORA, seed=0)
    experts = [name for name, tensor in before.items() if "experts" in name and tensor.dim() == 3]
    assert len(experts) >= 2
    for name, tensor in adapter_state(made).items():
        if ".lora_B." in name:
            tensor.normal_()
    merged = plain_state(made)
    assert merged.keys() == names
    for name in experts:
        delta = (merged[name] - before[name]).flatten(1)
        assert bool((delta.abs().amax(1) > 0.01).all()), f"each expert of {name}"
        assert all(torch.linalg.matrix_rank(each, rtol=1e-3) == 2 for each in merged[name] - before[name])


def test_targets_of_a_mixture_are_its_own_layers_and_no_others() -> None:
    made = tiny_stored.model("deepseek_v3")
    adapt(made, LoraConfig(rank=2, targets=("down_proj", "q_a_proj")), seed=0)
    owners = {name.split(".lora_")[0].replace(".base_layer", "") for name in adapter_state(made)}
    assert owners == {
        *(f"model.layers.{i}.self_attn.q_a_proj" for i in (0, 1)),
        *("model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts", "model.layers.1.mlp.shared_experts.down_proj"),
    }
    told = r"^--lora.targets w1 is none of .*: name some of down_proj, gate_up_proj, k_proj, o_proj, q_proj, v"
    with pytest.raises(InputError, match=told):
        adapt(tiny_stored.model("mixtral"), LoraConfig(rank=2, targets=("w1",)), seed=0)


def test_layers_with_a_forward_of_their_own_are_adapted_where_it_is_a_product() -> None:
    made = tiny_types.tiny_model("falcon")
    before = tiny_stored.logits(made)
    base = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    adapt(made, LORA, seed=0)
    assert torch.equal(tiny_stored.logits(made), before)
    tiny_stored.learn(made)
    merged = plain_state(made)
    changed = {key for key, tensor in merged.items() if not torch.equal(tensor, base[key])}
    assert changed == {key for key, tensor in base.items() if ".h." in key and tensor.dim() == 2}
    assert len(changed) == 8
    plain = tiny_stored.logits(with_weights(made, merged))
    torch.testing.assert_close(plain, tiny_stored.logits(made), rtol=0, atol=1e-4)


def test_a_model_without_linear_layers_is_not_adapted() -> None:
    with pytest.raises(InputError, match=r"^--lora.rank 2: this llama model has no linear layers [^\n]*$"):
        adapt(tiny_stored.model("llama", num_hidden_layers=0), LORA, seed=0)


def broken(files: PolicyFiles, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let what is saved be changed on the way to the disk."""
    own = PreTrainedModel.save_pretrained

    def saving(self: PreTrainedModel, folder: Path, **more: Any) -> None:
        own(self, folder, **more)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saving)


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("jamba", "mamba.dt_proj"),
        ("jamba", "mamba.out_proj"),
        ("longcat_flash", "classifier"),
        ("phimoe", "router"),
        ("llama4_text", "router"),
    ],
)
def test_layers_that_would_not_see_their_matrices_get_none(tmp_path: Path, kind: str, left_out: str) -> None:
    """Matrices that the model reads without calling their layer, and routers that compute more than a product."""
    if left_out == "mamba.dt_proj" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("older transformers call this layer, and it takes matrices")
    made = tiny_stored.model(kind)
    adapt(made, LORA, seed=0)
    names = {name.split(".lora_")[0] for name in adapter_state(made)}
    assert any(name.endswith("o_proj") for name in names)
    assert any(left_out in name for name, _ in made.named_parameters())
    assert not any(name.endswith(left_out) for name in names)
    tiny_stored.learn(made)
    wanted = tiny_stored.logits(made)
    save_model(made, tmp_path / "out")
    torch.testing.assert_close(
        tiny_stored.logits(read_by_others(tmp_path / "out", torch.float32)), wanted, rtol=1e-4, atol=1e-4
    )


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(HEAD),
        lambda weights: weights.update(more=torch.ones(1)),
        lambda weights: weights.update({HEAD: weights[HEAD].nextafter(torch.tensor(9.0))}),
        lambda weights: weights.update({HEAD: weights[HEAD].bfloat16()}),
    ],
    ids=["lost", "more", "last bit", "type"],
)
def test_a_folder_that_is_not_the_policy_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    made = tiny_stored.model("llama")
    tiny_stored.run_of(made, tmp_path / "run")
    files = PolicyFiles(made)
    broken(files, monkeypatch, change)
    told = r"differs from the policy in (lm_head.weight|more) when it is read back, so it was removed"
    with pytest.raises(InputError, match=told):
        files.write(tmp_path / "out", made.state_dict())
    with pytest.raises(InputError, match=told):
        export(ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out"), dtype="float32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_files_that_load_as_another_model_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of the policy, and the settings beside them are not."""
    made = tiny_stored.model("qwen3_moe-tied")
    own = PreTrainedModel.save_pretrained

    def saving(self: PreTrainedModel, folder: Path, **more: Any) -> None:
        own(self, folder, **more)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saving)
    with pytest.raises(
        InputError, match=r"cannot be read back, so it was removed: .*[(]it lacks 1 of 25 weights, lm_head\.weight"
    ):
        save_model(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("rms_norm_eps", 0.125, "differs from the policy in rms_norm_eps of its config.json"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 7.0},
            "differs from the policy in rope_parameters of its config.json",
        ),
        ("attention_bias", True, r"read back, so it was removed: .*k_proj\.bias"),
    ],
)
def test_settings_that_load_as_others_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, told: str
) -> None:
    made = tiny_stored.model("llama", **{name: value})
    own = PreTrainedModel.save_pretrained

    def saving(self: PreTrainedModel, folder: Path, **more: Any) -> None:
        own(self, folder, **more)
        settings = json.loads((folder / "config.json").read_text())
        del settings[name]
        (folder / "config.json").write_text(json.dumps(settings))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saving)
    with pytest.raises(InputError, match=told):
        save_model(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_policy_with_other_names_than_its_settings_say_is_refused_before_anything_is_written() -> None:
    made = tiny_stored.model("llama")
    made.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"^this llama model cannot be saved: model.layers.0.mlp.extra.bias \(2 such"):
        PolicyFiles(made)


def test_weights_are_compared_bit_by_bit_even_where_they_are_no_numbers(tmp_path: Path) -> None:
    made = tiny_stored.model("llama")
    with torch.no_grad():
        made.lm_head.weight[0, 0] = torch.nan
        made.lm_head.weight[0, 1] = -0.0
    save_model(made, tmp_path / "out")
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    state[HEAD][0, 1] = 0.0
    with pytest.raises(InputError, match=r"differs from the policy in lm_head\.weight"):
        check_loads(tmp_path / "out", state, made.config)


def test_a_head_that_settings_call_tied_and_is_not_stays_itself(tmp_path: Path) -> None:
    """transformers keeps two matrices apart that differ in the file, whatever the settings say."""
    folder = tiny_stored.stored(tiny_stored.model("llama"), tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    made = load_model(ModelConfig(), str(folder))
    save_model(made, tmp_path / "out")
    torch.testing.assert_close(
        tiny_stored.logits(load_model(ModelConfig(), str(tmp_path / "out"))), tiny_stored.logits(made), rtol=0, atol=0
    )


GENERATION: list[dict[str, Any]] = [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    {"do_sample": False, "temperature": 0.0, "eos_token_id": [1, 5]},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    {"temperature": 1.0, "transformers_version": "4.37.0", "our_own": {"a": 1}},
]


@pytest.mark.parametrize("settings", GENERATION)
def test_generation_settings_that_do_not_validate_are_kept_to_the_byte(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = tiny_stored.stored(tiny_stored.model("llama"), tmp_path / "base")
    text = json.dumps(settings, indent=3).encode()
    (folder / "generation_config.json").write_bytes(text)
    made = load_model(ModelConfig(), str(folder))
    assert generation_settings(str(folder)) == text
    save_model(made, tmp_path / "run" / "initial", generation=generation_settings(str(folder)))
    (tmp_path / "run" / "config.json").write_text("{}")
    out = export(ExportArguments(run_or_checkpoint=str(tmp_path / "run"), folder=str(tmp_path / "out"), step=0))
    assert (out / "generation_config.json").read_bytes() == text
    save_model(made, tmp_path / "without")  # as a warm start keeps it: what the model knows of it
    kept = json.loads((tmp_path / "without" / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in settings if name != "transformers_version"} == {
        name: value for name, value in settings.items() if name != "transformers_version"
    }
