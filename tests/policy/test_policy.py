"""The policy's log-probs and prompt embeddings against one plain forward pass per sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_policy
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paced_fast.config import ModelConfig
from paced_fast.errors import InputError
from paced_fast.policy import Policy, build_tiny, load_model
from paced_fast.policy import policy as policy_module
from paced_fast.policy.micro_batches import forward_rows


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("max_tokens", [1, 20, 4096])
def test_logprobs_equal_a_full_softmax(temperature: float, max_tokens: int) -> None:
    batch = tiny_policy.rollouts([4, 1, 0, 6, 2, 5, 1, 3, 2], group_size=3)
    policy = tiny_policy.policy(max_tokens=max_tokens)
    wanted = tiny_policy.naive_logprobs(policy.model, batch, temperature).detach()
    assert float(wanted.std()) > 0.5, "a uniform distribution would hide mistakes"
    torch.testing.assert_close(policy.logprobs(batch, temperature), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_temperature_divides_the_bias_of_the_output_layer_too(temperature: float) -> None:
    batch = tiny_policy.rollouts([4, 1, 0, 6])
    policy = Policy(tiny_policy.biased(), max_tokens=4096)
    wanted = tiny_policy.naive_logprobs(policy.model, batch, temperature).detach()
    torch.testing.assert_close(policy.logprobs(batch, temperature), wanted, rtol=1e-4, atol=1e-4)


def test_a_gpu_compiles_the_kernels_of_the_head_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        policy_module, "warm_up", lambda weight, *, bias, skipped_share: given.append((weight, bias, skipped_share))
    )
    policy = Policy(tiny_policy.biased(), max_tokens=4096)
    policy.warm_up()
    assert given == []  # a CPU has none
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    policy.warm_up(skipped_share=0.25)
    ((weight, bias, share),) = given
    assert share == 0.25
    assert torch.equal(weight, policy.head[0])
    assert torch.equal(bias, policy.head[1])
    assert not weight.requires_grad


def sliding_model(family: str) -> PreTrainedModel:
    """Layers that see three tokens back, all of them or one of two."""
    sizes = {
        "vocab_size": tiny_policy.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": tiny_policy.STOP,
    }
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    made = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, **kinds, use_sliding_window=True)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **kinds)),
    }[family]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return made.eval()


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3"])
def test_a_sliding_window_counts_along_a_sequence_and_not_along_a_row(family: str) -> None:
    """Rows share a prompt, so two neighbours in a row may be far from each other, and never the other way round."""
    batch = tiny_policy.rollouts([4, 1, 0, 6, 2, 5, 1, 3, 7], group_size=3, prompt_lengths=(5, 9, 2))
    policy = Policy(sliding_model(family), max_tokens=4096)
    wanted = tiny_policy.naive_logprobs(policy.model, batch).detach()
    assert float(wanted.std()) > 0.5
    torch.testing.assert_close(policy.logprobs(batch, 1.0), wanted, rtol=1e-4, atol=1e-4)
    policy.model.config.sliding_window = 100
    assert float((policy.logprobs(batch, 1.0) - wanted).abs().max()) > 0.1, "the window matters"


def test_layers_of_other_kinds_are_refused() -> None:
    model = sliding_model("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(
        InputError, match=r"this model of type qwen3 cannot be run on text alone \('linear_attention'\)"
    ):
        Policy(model, max_tokens=10)


@pytest.mark.parametrize("max_tokens", [1, 11, 4096])
def test_embeddings_are_means_over_the_prompt_whatever_its_neighbours(max_tokens: int) -> None:
    policy = tiny_policy.policy(max_tokens=max_tokens)
    prompts = [(3, 4, 5, 6, 7), (2,), (9, 8, 7), (0, 0, 4), (9, 8, 7)]
    with torch.no_grad():
        alone = [policy.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in prompts]
    torch.testing.assert_close(policy.embed(prompts), torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert policy.embed([]).shape == (0, 16)


def test_attention_masks_are_made_once_for_all_layers() -> None:
    """A boolean mask would be turned into numbers in every layer, and each of them kept for the backward pass."""
    policy = Policy(tiny_policy.model(), max_tokens=4096)
    batch = tiny_policy.rollouts([4, 1, 6, 2, 5, 1], group_size=3)
    length = forward_rows(batch, 4096).input_ids.shape[1]
    masks = set[int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (length, length):
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.hidden(batch)
    assert len(masks) == 1


def test_a_frozen_copy_stays_what_it_was() -> None:
    policy = tiny_policy.policy()
    batch = tiny_policy.rollouts([3, 2])
    copy, before = policy.frozen_copy(), policy.logprobs(batch, 1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(copy.logprobs(batch, 1.0), before)
    assert not torch.equal(policy.logprobs(batch, 1.0), before)
    assert copy.parameters() == []


def test_weights_depend_on_the_seed_only() -> None:
    config = ModelConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
    torch.manual_seed(5)
    ambient = torch.get_rng_state()
    first = build_tiny(config, 11, stop_id=1, pad_id=0, seed=3)
    assert torch.equal(torch.get_rng_state(), ambient)
    torch.manual_seed(6)
    again, other = (build_tiny(config, 11, stop_id=1, pad_id=0, seed=seed) for seed in (3, 4))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_wrong_models_are_refused_in_one_line(tmp_path: Path) -> None:
    config = ModelConfig(hidden_size=18, num_heads=4)
    with pytest.raises(InputError, match=r"^--model.hidden-size 18 must be a multiple of twice --model.num-heads 4$"):
        build_tiny(config, 11, stop_id=1, pad_id=0, seed=0)
    for folder in ("/nowhere/at/all", "runs/a/initial", f"{tmp_path}/gone", "../gone"):
        with pytest.raises(InputError, match=rf"^the model folder {folder} does not exist: check the path$"):
            load_model(config, folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^--model.name '[^\n]*' cannot be loaded \([^\n]*\)[^\n]*$"):
        load_model(config, str(tmp_path))


def test_a_bfloat16_model_turns_by_float32_frequencies() -> None:
    """Rounded to 8 bits, a frequency near 1 is off by up to 2^-9, which at position 1000 is two radians."""
    config = ModelConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, dtype="bfloat16")
    made = build_tiny(config, tiny_policy.VOCAB, stop_id=1, pad_id=0, seed=0)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    wanted = 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(made.model.rotary_emb.inv_freq, wanted, rtol=1e-6, atol=0)
