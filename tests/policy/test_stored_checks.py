"""Stored models that cannot be trained are one line that names why; not a single weight is drawn at random."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_stored
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from paced_fast.config import ModelConfig
from paced_fast.data.prompts import load_tokenizer
from paced_fast.errors import InputError
from paced_fast.policy import load_model
from paced_fast.policy.loading import model_settings, skeleton
from paced_fast.policy.stored_checks import quantisation

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stored.stored(tiny_stored.model("llama"), tmp_path_factory.mktemp("stored") / "llama")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stored.stored(tiny_stored.model("mixtral"), tmp_path_factory.mktemp("stored") / "mixtral")


def refusal(folder: Path) -> str:
    """The line that a folder is refused by."""
    with pytest.raises(InputError) as raised:
        load_model(ModelConfig(), str(folder))
    line = str(raised.value)
    assert line.startswith(f"--model.name '{folder}' cannot be loaded ("), line
    assert "\n" not in line
    return line


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {re.sub(old, new, name): tensor for name, tensor in weights.items()}


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


def rewritten(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(load_file(folder / WEIGHTS))
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def with_settings(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            renamed("^", "_orig_mod."),
            r"prefix of a wrapper: _orig_mod\.lm_head\.weight, from torch\.compile\): save the",
        ),
        (renamed("^", "module."), r"module\.lm_head\.weight, from DataParallel or DistributedDataParallel\)"),
        (renamed("^", "module._orig_mod."), r"module\._orig_mod\.lm_head"),
        (renamed(r"(layers\.\d)", r"\1._fsdp_wrapped_module"), r"_fsdp_wrapped_module.*, from FSDP\)"),
        (renamed("mlp", "mlp._checkpoint_wrapped_module"), "from activation checkpointing"),
        (renamed("^", "base_model.model."), "base_model.model.lm_head.weight, from PEFT"),
        (renamed("q_proj", "q_proj.base_layer"), "base_layer.weight, from PEFT"),
        (without("layers.1."), r"it lacks 9 of 21 weights, model.layers.1.input_layernorm.weight, .* and 7 more\)"),
        (without("lm_head"), r"it lacks 1 of 21 weights, lm_head.weight\): give a complete causal language model"),
        (renamed("lm_head", "score"), r"lacks 1 of 21 weights, lm_head.weight, and has score.weight instead"),
        (renamed("^model", "language"), "it lacks 20 of 21 weights"),
        (
            lambda weights: {**weights, "lm_head.weight": torch.ones(12, 16)},
            r"1 weights have other shapes than config.json says: lm_head.weight is \[12, 16\] and should be \[11, 16\]",
        ),
        (
            lambda weights: {**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)},
            "q_proj.bias: the layer in its config.json has no such weight and would compute something else",
        ),
        (
            lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"].to(torch.float8_e4m3fn)},
            "its weights are quantised: lm_head.weight has dtype F8_E4M3",
        ),
        (
            lambda weights: {**weights, "lm_head.weight": torch.ones(11, 16, dtype=torch.int8)},
            "lm_head.weight has dtype I8",
        ),
        (lambda weights: {**weights, "lm_head.weight_scale_inv": torch.ones(1, 1)}, "lm_head.weight_scale_inv: the"),
        (lambda weights: {**weights, "lm_head.SCB": torch.ones(11)}, "lm_head.SCB: the layer"),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_refused(
    llama: Path, tmp_path: Path, change: Callable[[Weights], Weights], told: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    rewritten(folder, change)
    assert re.search(told, refusal(folder)), refusal(folder)


@pytest.mark.parametrize(
    "lost", ["experts.2.w1", "experts.3.", "experts.", "block_sparse_moe.gate"], ids=lambda name: name.strip(".")
)
def test_an_expert_that_is_missing_is_refused(mixture: Path, tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mixture, folder)
    rewritten(folder, without(lost))
    line = refusal(folder)
    assert "mlp.experts" in line or "mlp.gate" in line or "conversion" in line, line


def test_what_may_be_missing_is_not_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tied heads, and tables that follow from the settings, are in no file; a head of another task is one more."""
    tied = tiny_stored.stored(tiny_stored.model("llama-tied"), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tied / WEIGHTS)
    rewritten(tied, lambda weights: {**weights, "v_head.summary.weight": torch.ones(1, 16)})
    rewritten(tied, lambda weights: {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    made = load_model(ModelConfig(), str(tied))
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert "1 stored weights are not used by the model, such as v_head.summary.weight" in caplog.text
    base = tmp_path / "base"  # the names of a model without its head
    LlamaModel.from_pretrained(tied).save_pretrained(base)
    again = load_model(ModelConfig(), str(base))
    torch.testing.assert_close(tiny_stored.logits(again), tiny_stored.logits(made), rtol=0, atol=0)
    old = tiny_stored.stored(tiny_stored.model("gpt2"), tmp_path / "gpt2")  # with masks, as older versions kept them
    rewritten(old, lambda weights: {**weights, "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)})
    load_model(ModelConfig(), str(old))


def sharded(folder: Path, source: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="4KB")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4999819336\n"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "the folder is empty"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(POINTER),
            "model.safetensors is a git-lfs pointer instead of the file, ",
        ),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "model.safetensors is cut off or damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x00" * 64), "is cut off or damaged"),
        (lambda folder: cut(folder / WEIGHTS, 100), "model.safetensors is cut off or damaged"),
        (
            lambda folder: cut(folder / WEIGHTS, 9000),
            r"has 9000 bytes, but its header says \d+\): download the model again",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "it has no weights: neither model.safetensors nor"),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
            r"its weights are pickled, and reading a pickle can run code\): load it with transformers, save it with",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}'),
            r"it holds adapters \(adapter_config.json\), not a whole model\): merge them",
        ),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_bytes(POINTER), "config.json"),
        (
            lambda folder: (folder / "hf_quant_config.json").write_text("{}"),
            "its weights are quantised, according to hf_quant_config",
        ),
        (
            lambda folder: [(folder / "config.json").unlink(), (folder / "m.gguf").touch()],
            "its weights are quantised: m.gguf is a GGUF file",
        ),
        (
            lambda folder: with_settings(folder, architectures=["LlamaForSequenceClassification"]),
            "does not generate text",
        ),
        (lambda folder: with_settings(folder, model_type="unheard_of"), "model type `unheard_of`"),
        (lambda folder: with_settings(folder, hidden_size="wide"), "Field 'hidden_size' expected int"),
        (lambda folder: with_settings(folder, num_attention_heads=0), "ZeroDivisionError: integer modulo"),
        (
            lambda folder: with_settings(
                folder, model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"}
            ),
            "contains custom code|custom code",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(
    llama: Path, tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    spoil(folder)
    assert re.search(told, refusal(folder)), refusal(folder)


def test_a_lost_or_cut_shard_is_refused(llama: Path, tmp_path: Path) -> None:
    sharded(tmp_path / "whole", llama)
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 2
    load_model(ModelConfig(), str(tmp_path / "whole"))
    for spoil, told in (
        (lambda path: path.unlink(), rf"1 of the {len(shards)} files in {INDEX} are missing, such as {shards[1].name}"),
        (lambda path: path.write_bytes(POINTER), f"{shards[1].name} is a git-lfs pointer"),
        (lambda path: cut(path, path.stat().st_size - 1), f"{shards[1].name} has .* its header says"),
        (lambda path: (path.parent / INDEX).write_text("[]"), f"{INDEX} is not a valid index"),
        (lambda path: (path.parent / INDEX).write_bytes(POINTER), f"{INDEX} is a git-lfs pointer"),
    ):
        folder = tmp_path / "spoilt"
        shutil.copytree(tmp_path / "whole", folder)
        spoil(folder / shards[1].name)
        assert re.search(told, refusal(folder)), refusal(folder)
        shutil.rmtree(folder)


QUANTISED: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "fbgemm_fp8"},
    {"quant_method": "compressed-tensors", "format": "float-quantized"},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "torchao", "quant_type": "int4"},
    {"quant_method": "quanto", "weights": "int8"},
    {"quant_method": "hqq"},
    {"quant_method": "of tomorrow"},
]


@pytest.mark.parametrize("settings", QUANTISED, ids=lambda settings: settings["quant_method"])
def test_quantised_checkpoints_are_refused_by_name(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    with_settings(folder, quantization_config=settings)
    told = (
        f"its weights are quantised with {settings['quant_method']}): training needs plain weights: give the model in"
    )
    assert told in refusal(folder)
    with pytest.raises(InputError, match="its weights are quantised"):  # a dry run says it, too
        model_settings(ModelConfig(name=str(folder)), 11)


def test_quantised_parts_count() -> None:
    assert quantisation({"text_config": {"quantization_config": {"quant_method": "fp8"}}}) == "fp8"
    assert quantisation({"compression_config": {"format": "x"}}) == "compression_config"
    assert quantisation({"quantization_config": {"quant_algo": "NVFP4"}}) == "NVFP4"
    assert quantisation({"quantization_config": None, "text_config": {"a": 1}}) is None


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("bert", {}, "bert with is_decoder false is an encoder, whose tokens attend to later tokens"),
        ("roberta", {}, "roberta with is_decoder false is an encoder"),
        (
            "bert",
            {"architectures": ["BertForMaskedLM"], "is_decoder": True},
            "a BertForMaskedLM does not generate text",
        ),
        ("t5", {}, "t5 is an encoder-decoder model"),
        ("bart", {}, "bart is an encoder-decoder model"),
        ("vit", {}, "Unrecognized configuration class"),
    ],
)
def test_other_kinds_of_models_are_refused(
    llama: Path, tmp_path: Path, kind: str, settings: dict[str, Any], told: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    AutoConfig.for_model(kind).save_pretrained(folder)
    with_settings(folder, **settings)
    assert told in refusal(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "gpt2", "mixtral"])
def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    """Some classes without their files are a tokenizer of one special token, which writes every prompt as nothing."""
    tiny_stored.model(kind).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^cannot load the tokenizer '[^\n]*$"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_a_tokenizer_of_pointers_is_refused(llama: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(POINTER)
    with pytest.raises(
        InputError,
        match=rf"^cannot load the tokenizer '[^\n]*: {file} is a git-lfs pointer instead of the file, [^\n]*$",
    ):
        load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_attention_heads": 0},
        {"vocab_size": "many"},
        {"hidden_act": "unheard_of"},
        {"rope_parameters": {"rope_type": "unheard_of", "rope_theta": 1e4}},
        None,
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_one_line_wherever_it_is_read(
    llama: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    if settings is None:
        (folder / "config.json").write_text("[]")
    else:
        with_settings(folder, **settings)
    refusal(folder)
    with pytest.raises(InputError, match=r"^[^\n]*$"):
        skeleton(model_settings(ModelConfig(name=str(folder)), 1))
    if settings in (None, {"num_attention_heads": 0}, {"vocab_size": "many"}):
        with pytest.raises(
            InputError, match=r"^cannot load the tokenizer '[^\n]*\): give the folder of a complete model"
        ):
            load_tokenizer(str(folder))


def test_layers_that_guess_further_tokens_may_be_left_out(llama: Path, tmp_path: Path) -> None:
    """Some types have them behind their own layers; elsewhere they are layers that the configuration forgot."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    with_settings(folder, num_hidden_layers=1)
    told = r"it has more layers than its config.json says, model.layers.1.input_layernorm.weight, .* and 7 more\)"
    assert re.search(told, refusal(folder))
    with_settings(folder, num_nextn_predict_layers=1)
    assert load_model(ModelConfig(), str(folder)).config.num_hidden_layers == 1


@pytest.mark.parametrize("given", ["run", "run/checkpoints/step_000004"])
def test_a_run_given_as_a_model_is_told_where_its_model_is(llama: Path, tmp_path: Path, given: str) -> None:
    policy = tmp_path / "run" / "checkpoints" / "step_000004" / "policy"
    shutil.copytree(llama, policy)
    (tmp_path / "run" / "config.json").write_text('{"steps": 4}')
    told = rf"^'[^\n]*' is a run or a checkpoint, not a model: give the model in it, {re.escape(str(policy))}$"
    with pytest.raises(InputError, match=told):
        load_tokenizer(str(tmp_path / given))
    load_tokenizer(str(policy))
