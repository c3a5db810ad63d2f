"""Scripts for GRPOTrainer run with `PacedTrainer`: the same completions, rewards and logs under each option of TRL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_alike import alike, chat_tokenizer, moved, run

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")

import tiny_policy
import tiny_trl
from datasets import Dataset
from packaging.version import Version
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from paced_fast.integrations.trl import PacedConfig, PacedTrainer
from paced_fast.integrations.trl_head import FUSED, HOST

# ---- rewards --------------------------------------------------------------------------------------------------------


async def awaited(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [float(a in c) if i % 3 else None for i, (a, c) in enumerate(zip(answer, completions, strict=True))]


def logging_reward(
    completions: list[str], log_extra: Any, log_metric: Any, trainer_state: Any, **_: Any
) -> list[float]:
    log_extra("length", [len(c) for c in completions])
    log_metric("steps", float(trainer_state.global_step))
    return [0.25 * (len(c) % 4) for c in completions]


def silent(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("functions", "changes"),
    [
        (awaited, {}),
        ([tiny_trl.reward, awaited], {"reward_weights": [0.5, 2.0]}),
        ([tiny_trl.reward, logging_reward], {"log_completions": True}),
        (silent, {}),
    ],
    ids=["async", "weights", "logs", "none"],
)
def test_reward_functions(tmp_path: Path, functions: Any, changes: dict[str, Any]) -> None:
    made = alike(tmp_path, options={"reward_funcs": functions}, **changes)
    assert bool(moved(made)) == (functions is not silent)
    if changes.get("log_completions"):
        assert list(made._logs["extra"]["length"]) == [len(c) for c in made._logs["completion"]]
        assert (tmp_path / "ours" / "completions" / "completions_00001.parquet").is_file()
    if functions is silent:
        assert made.state.log_history[0]["loss"] == 0.0


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForSequenceClassification(LlamaConfig(vocab_size=16, num_labels=1, pad_token_id=0, **sizes))
    made.config._name_or_path = "maker/judge"
    return made


def test_a_reward_model_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    options = {"reward_funcs": [reward_model(), tiny_trl.reward]}
    options |= {"reward_processing_classes": [tiny_trl.tokenizer(), None]}
    assert alike(tmp_path, options=options).reward_func_names == ["judge", "reward"]


# ---- data and evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (lambda: tiny_trl.data().to_iterable_dataset(), {}),
        (tiny_trl.data, {"shuffle_dataset": False}),
        (tiny_trl.data, {"generation_kwargs": {"top_k": 3, "length_penalty": -0.1}, "min_p": 0.01, "top_p": 0.95}),
        (tiny_trl.data, {"cache_implementation": "static", "num_generations": 2}),
        (tiny_trl.data, {"num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (tiny_trl.data, {"use_liger_kernel": False, "gradient_checkpointing": True, "cast_lm_head_to_fp32": True}),
        (tiny_trl.data, {"mask_truncated_completions": True, "max_completion_length": 2}),
    ],
    ids=["stream", "order", "generation", "cache", "groups", "checkpointing", "truncated"],
)
def test_data_and_generation(tmp_path: Path, data: Callable[[], Any], changes: dict[str, Any]) -> None:
    assert moved(alike(tmp_path, options={"train_dataset": data}, whole=not changes, **changes))


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (tiny_trl.data(4), {"num_generations_eval": 1}),
        ({"a": tiny_trl.data(4), "b": tiny_trl.data(2)}, {"eval_on_start": True}),
        (tiny_trl.data(4).to_iterable_dataset(), {"per_device_eval_batch_size": 4}),
    ],
    ids=["one", "several", "stream"],
)
def test_evaluation(tmp_path: Path, data: Any, changes: dict[str, Any]) -> None:
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    made = alike(tmp_path, options={"eval_dataset": data}, **changes)
    evaluations = [entry for entry in made.state.log_history if any(name.startswith("eval_") for name in entry)]
    assert len(evaluations) == (4 if isinstance(data, dict) else 1)
    assert all("eval_tb/residual_rms" in entry for entry in evaluations)


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert isinstance(args, GRPOConfig)
        self.steps.append(state.global_step)


def test_callbacks_optimizers_and_model_cards(tmp_path: Path) -> None:
    seen = Seen()
    made_model = tiny_policy.model(sharpness=2.0)
    optimizer = torch.optim.SGD(made_model.parameters(), lr=0.1)
    made = PacedTrainer(
        made_model,
        tiny_trl.reward,
        tiny_trl.settings(tmp_path, max_steps=2, save_strategy="steps", save_steps=2),
        tiny_trl.data(),
        processing_class=tiny_trl.tokenizer(),
        callbacks=[seen],
        optimizers=(optimizer, None),
    )
    made.train()
    assert seen.steps == [1, 2]
    assert made.optimizer.optimizer is optimizer
    made.save_model(str(tmp_path / "final"))
    made.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "PACED-RL" in card
    assert "2602.12642" in card
    assert "GRPO" not in card
    assert (tmp_path / "final" / "model.safetensors").is_file()


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    made = peft.get_peft_model(tiny_policy.model(sharpness=2.0), lora())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_an_adapter_that_is_there_already(tmp_path: Path, fused: bool, checkpointing: bool) -> None:
    made = run(
        PacedTrainer,
        PacedConfig,
        tmp_path,
        {"model": adapted},
        {"fused": fused, "gradient_checkpointing": checkpointing, "max_steps": 2},
    )
    assert moved(made) == {name for name in made.before if "lora_" in name}
    assert made.head.way == (FUSED if fused else HOST)


def test_adapters_are_trained_as_by_trl(tmp_path: Path) -> None:
    assert moved(alike(tmp_path / "there", options={"model": adapted}))
    assert moved(alike(tmp_path / "new", options={"peft_config": lora()}))


def test_a_saved_head_beside_an_adapter_is_trained(tmp_path: Path) -> None:
    made = run(PacedTrainer, PacedConfig, tmp_path, {"peft_config": lora(modules_to_save=["lm_head"])}, {})
    before = tiny_policy.model(sharpness=2.0).lm_head.weight
    head = made.model.get_output_embeddings()
    assert made.head.way == FUSED
    assert torch.equal(head.original_module.weight, before)
    assert not torch.equal(head.modules_to_save["default"].weight, before)


def test_prompt_tuning_trains_the_prompt_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = run(PacedTrainer, PacedConfig, tmp_path, {"peft_config": config}, {"max_steps": 2})
    assert len(moved(made)) == 1


# ---- conversations, tools, environments -----------------------------------------------------------------------------


def chat_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=105, pad_token_id=0, eos_token_id=2, bos_token_id=None, **sizes))


def chats() -> Dataset:
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": text}] for text in ("Hi", "3*4?", "Ho")], "answer": ["a", "b", "c"]}
    )


def chat_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.125 * (len(str(c[-1].get("content"))) % 8) for c in completions]


CHAT = {"model": chat_model, "train_dataset": chats, "processing_class": chat_tokenizer(), "reward_funcs": chat_reward}


def test_conversations_and_settings_of_their_template(tmp_path: Path) -> None:
    made = alike(tmp_path, options=CHAT, chat_template_kwargs={"enable_thinking": False})
    ids = made.processing_class.apply_chat_template(
        chats()[0]["prompt"], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert "<think>\n\n</think>" in made.processing_class.decode(ids)
    assert made._logs["completion"][0][0]["role"] == "assistant"


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


async def later(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    await asyncio.sleep(0)
    return a * b


def spoken(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Completions that are written down: of the first turn `calls`, later ones end at once."""
    tokenizer = chat_tokenizer()

    def single_turn(self: Any, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        is_later = tokenizer.convert_tokens_to_ids("<tool_response>") in prompt_ids[0]
        texts = ["Done" + "!" * (i % 2) for i in range(len(prompt_ids))] if is_later else calls
        return [tokenizer(text + "<|im_end|>")["input_ids"] for text in texts], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", single_turn)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("tool", [multiply, later])
def test_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any) -> None:
    good, bad = call(tool.__name__, '{"a": 3, "b": 4}'), call(tool.__name__, '{"a": 3, "c": 4}')
    spoken(monkeypatch, [good, bad, "No", "Not so"] * 2)
    options = {**CHAT, "tools": [tool]}
    made = alike(tmp_path, options=options, max_completion_length=300)
    assert made.state.log_history[0]["tools/call_frequency"] == 0.5
    assert made.state.log_history[0]["tools/failure_frequency"] == 0.5
    assert {"role": "tool", "name": tool.__name__, "content": "12"} in made._logs["completion"][0]
    assert not bool(made._buffered_inputs[0]["tool_mask"].all())
    assert moved(made)


class Counter:
    """Counts what it is told to, and rewards the count."""

    def reset(self, **columns: Any) -> str:
        self.count = 0
        return "Count."

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: How much.

        Returns:
            The count.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


needs_parser = pytest.mark.skipif(
    Version(metadata.version("transformers")) < Version("5.13") and util.find_spec("jmespath") is None,
    reason="TRL reads calls of tools by jmespath where transformers is older than 5.13",
)


@needs_parser
@pytest.mark.parametrize("has_data", [True, False])
def test_environments_that_own_rewards_and_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_data: bool
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    spoken(monkeypatch, [call("increment", f'{{"step": {i % 4}}}') for i in range(8)])
    options = {**CHAT, "reward_funcs": [], "environment_factory": Counter}
    if not has_data:
        options |= {"train_dataset": lambda: None}
    made = alike(tmp_path, options=options, max_completion_length=300)
    assert list(made._logs["rewards"]["Counter"]) == [0.0, 1.0, 2.0, 3.0] * 2
    assert made._logs["prompt"][0][-1]["content"].endswith("Count.")


def test_data_that_only_names_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    spoken(monkeypatch, [call("increment", f'{{"step": {i % 4}}}') for i in range(8)])
    data = Dataset.from_dict({"environment": ["a", "b"] * 4})
    options = {**CHAT, "reward_funcs": None, "environment_factory": {"a": Counter, "b": Counter}}
    made = alike(tmp_path, options={**options, "train_dataset": lambda: data}, max_completion_length=300)
    assert list(made._logs["rewards"]["Counter"]) == [0.0, 1.0, 2.0, 3.0] * 2
