"""Families of language models: how logits follow from states, and whether sequences that share a row stay apart.

Known types are in tables, checked by a sweep over all types of transformers. Unknown properties are tested on the model
itself with a few tokens, before the policy is made.

B = sequences, L = tokens, H = size of the states that enter the output layer, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paced_fast.config import Config
from paced_fast.data.records import PromptTable
from paced_fast.errors import InputError
from paced_fast.policy.shape import Positions, differs, positions, setting, text_settings

_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Types whose logits are their output layer's of the last state and nothing else, whatever their settings."""

SHAREABLE = frozenset(
    {
        *_PLAIN,
        *("afmoe", "apertus", "arcee", "aria_text", "axk1", "bert-generation", "biogpt", "bitnet", "cohere"),
        *("cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1"),
        *("emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma"),
        *("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe"),
        *("glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoeshared"),
        *("helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2"),
        *("jetmoe", "laguna", "longcat_flash", "mellum", "minimax_m2", "minimax_m3_vl_text", "ministral"),
        *("ministral3", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi"),
        *("phi3", "phi4_multimodal", "phimoe", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "solar_open"),
        *("starcoder2", "whisper", "youtu"),
    }
)
"""Types of text configurations for which rows that share a prompt, masked or packed, were found to be exact."""

PADDABLE = frozenset(
    {
        *("bert", "big_bird", "bloom", "codegen", "doge", "electra", "ernie", "falcon", "gemma2", "gpt_neo"),
        *("gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "megatron-bert"),
        *("mimo_v2_flash", "minicpm3", "mllama_text_model", "modernbert-decoder", "mpt", "nemotron", "phimoe"),
        *("qwen2_moe", "rembert", "roc_bert", "stablelm", "vaultgemma", "xglm"),
    }
)
"""Types that read prompts padded on the left, with a cache, as they would read them alone, though they cannot share."""

_KEEP_WINDOWS = ("phimoe", "qwen2_moe")
"""Types whose layers do not tell their window to the function that attends."""

_LOOK_AHEAD = "let tokens attend to later tokens, so that completions have no log-probs"
REFUSED = {
    **dict.fromkeys(("cpmant", "prophetnet", "xlnet"), _LOOK_AHEAD),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "draft for another model and do not stand alone"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "generate audio, for a text that is not part of the prompt"),
}
"""Types that cannot be a policy, and why."""

_ENCODERS = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *(
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
    }
)
"""Types that look ahead unless `is_decoder` is set."""

_SCALES = (
    *("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier", "final_logit_softcapping"),
    *("output_logit_soft_cap", "logits_soft_cap"),
)
"""Settings that models multiply or divide their logits by, or bound them with."""
_ATTENTION_CAPS = ("attn_logit_softcapping",)
_KINDS = {"full_attention", "sliding_attention"}
BROKEN = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ImportError)
"""Exceptions of a model that does not accept its arguments."""


@dataclass(frozen=True, slots=True)
class Family:
    """Logits of a model from its states: cap(scale * (states W + b))."""

    model_type: str
    settings: Any
    """The text part of the model's configuration."""
    limit: Positions
    scale: float = 1.0
    cap: float | None = None
    """Logits are bounded by cap * tanh(logits / cap)."""


def refuse(settings: Any) -> None:
    """Raises InputError for a configuration whose model cannot be a policy, as far as the configuration tells."""
    text = text_settings(settings)
    kind = getattr(settings, "model_type", "")
    why = REFUSED.get(kind) or REFUSED.get(getattr(text, "model_type", ""))
    if why is None and kind in _ENCODERS and not getattr(settings, "is_decoder", False):
        why = f"{_LOOK_AHEAD}, unless is_decoder is set in their configuration"
    if why is not None:
        raise InputError(f"--model.name: models of type {kind} {why}: give another model")


def unshareable(settings: Any) -> str | None:
    """Reason why sequences of a model of this configuration need separate rows, or None."""
    text = text_settings(settings)
    kind = getattr(text, "model_type", "")
    if kind not in SHAREABLE:
        return f"models of type {kind} are exact only with one sequence per row"
    others = set(getattr(text, "layer_types", None) or ()) - _KINDS
    if others:
        return f"this {kind} model has layers of type {min(others)}, which need one row per sequence"
    if differs(text, "sliding_window"):
        return f"this {kind} model has sliding windows of several sizes, which need one row per sequence"
    if kind in _KEEP_WINDOWS and setting(text, "sliding_window") is not None:
        return f"this {kind} model does not pass on its sliding window, so it needs one row per sequence"
    if any(setting(text, name) is not None for name in _ATTENTION_CAPS):
        return f"this {kind} model caps its attention scores, which no kernel for shared rows supports"
    return None


def planned(config: Config, settings: Any) -> Config:
    """The settings with the layout that a model of this configuration gets in place of `auto`, for plans.

    Raises InputError for a configuration that cannot be a policy, and for a layout that is not exact for it.
    """
    refuse(settings)
    why = unshareable(settings)
    if why is None or config.model.attention == "padded":
        return config
    if config.model.attention != "auto":
        raise InputError(f"--model.attention {config.model.attention}: {why}: use auto or padded")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="padded"))


def admit(config: Config, model: PreTrainedModel, tables: Sequence[PromptTable]) -> None:
    """Raises InputError when the run's settings and prompts, to train on and held out, are not for this model."""
    check_finite(model)
    limit = examine(model).limit
    planned(config, model.config)
    longest, held_out = (max((len(row.token_ids) for row in table.rows), default=0) for table in tables)
    check_positions(limit, config, longest=longest, longest_held_out=held_out)


def check_finite(model: PreTrainedModel) -> None:
    """Raises InputError for a model with a weight that is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not bool((finite := torch.isfinite(weight)).all()):
            raise InputError(
                f"--model.name: {int((~finite).sum())} of {weight.numel()} values of {name} are infinite or NaN: give "
                "a model that was saved before its training diverged, or download it again"
            )


def check_positions(limit: Positions, config: Config, *, longest: int, longest_held_out: int) -> None:
    """Raises InputError when a prompt of this many tokens and its completion exceed the model's positions."""
    generation, evaluation = config.generation.max_completion_tokens, config.evaluation.max_completion_tokens
    for prompt, cut, owner, kind in (
        (longest, generation, "generation", "a training prompt"),
        (longest_held_out, evaluation or generation, "evaluation" if evaluation else "generation", "a held-out prompt"),
    ):
        if limit.longest is not None and prompt + cut > limit.longest:
            raise InputError(
                f"--model.name: {kind} of {prompt} tokens and its completion of up to {cut} do not fit in {limit.why}: "
                f"lower --{owner}.max-completion-tokens or --data.max-prompt-tokens, or use another model"
            )


def is_plain(settings: Any) -> bool:
    """Whether no test is needed: a common type with common settings."""
    scaled = any(setting(text_settings(settings), name) not in (None, 1, 1.0) for name in _SCALES)
    return settings.model_type in _PLAIN and not scaled and unshareable(settings) is None


def check_length(limit: Positions, tokens: int, remedy: str) -> None:
    """Raises InputError when a sequence of this many tokens exceeds the model's positions."""
    if limit.longest is not None and tokens > limit.longest:
        raise InputError(f"prompt and completion have {tokens} tokens together and do not fit in {limit.why}: {remedy}")


def check_taught(limit: Positions, prompt_tokens: int, completion_tokens: int) -> None:
    """Raises InputError when a prompt and its completion exceed the model's positions."""
    remedy = "lower --data.max-prompt-tokens or --generation.max-completion-tokens"
    check_length(limit, prompt_tokens + completion_tokens, remedy)


def examine(model: PreTrainedModel) -> Family:
    """Family of the model, found by tests where its type alone does not tell. Raises InputError when it cannot be a
    policy."""
    refuse(model.config)
    settings = text_settings(model.config)
    kind = model.config.model_type
    head = output_layer(model)
    if any(setting(settings, name) is not None for name in _ATTENTION_CAPS):
        model.set_attn_implementation("eager")  # the only one that caps scores
    limit = positions(settings)
    if is_plain(model.config):
        return Family(kind, settings, limit)
    if head.weight.is_meta:
        return Family(kind, settings, limit)
    try:
        with torch.no_grad():
            return _tried(model, Family(kind, settings, limit), head)
    except BROKEN as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--model.name: this model of type {kind} cannot be run on text alone ({reason}): give another model"
        ) from error


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of states. Raises InputError for a model that has none, or another kind."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"--model.name: models of type {model.config.model_type} have no linear output layer for tokens: "
            "give a causal language model"
        )
    return head


def head_states(model: PreTrainedModel, ids: Tensor, *, wrapper: nn.Module | None = None, **inputs: Tensor) -> Tensor:
    """Input of the output layer [B, L, H] when the model reads `ids` [B, L] by itself, without the logits.

    `inputs` are further arguments of the forward pass, such as `attention_mask`. A `wrapper` of the model (DDP, say) is
    called in its place.
    """
    head = output_layer(model)
    caught: list[Tensor] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        caught.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with _instead(head, forward):
        (wrapper or model)(input_ids=ids, **inputs, **without_cache(model))
    if not caught:
        raise InputError(
            f"--model.name: models of type {model.config.model_type} do not call their output layer: give another model"
        )
    return caught[0]


@contextlib.contextmanager
def _instead(head: nn.Linear, forward: Any) -> Iterator[None]:
    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Argument that keeps a model from making a cache; empty for models without it."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's forward pass has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def logits_of(family: Family, raw: Tensor) -> Tensor:
    """The model's logits from those of its output layer."""
    logits = raw.float() * family.scale
    return logits if family.cap is None else family.cap * torch.tanh(logits / family.cap)


def spare_tokens(family: Family) -> int:
    """Number of tokens that a test may use beyond the fewest; models with few positions are tested with fewer."""
    longest = family.limit.longest
    if longest is not None and longest < 8:
        raise InputError(
            f"--model.name: at least 8 positions are needed, and this is {family.limit.why}: give another model"
        )
    return 7 if longest is None else min(7, longest - 5)


def probe_tokens(settings: Any, text: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of tokens that mean nothing: none that stands for an image or the like, and one that stands for padding.

    Some models count positions by tokens of padding, and a completion may hold one.
    """
    special: set[int] = set()
    padding = None
    for part in (settings, text):
        for name, value in vars(part).items():
            if name == "pad_token_id" and isinstance(value, int):
                padding = value
            elif name.endswith(("_token_id", "_token_index")):
                special |= set(value) if isinstance(value, list | tuple) else {value}
    size = int(getattr(text, "vocab_size", None) or text.n_words)
    allowed = [token for token in range(min(size, 4096)) if token not in special]
    source = torch.Generator().manual_seed(0)
    rows = [[allowed[i] for i in torch.randint(len(allowed), (n,), generator=source).tolist()] for n in lengths]
    if padding is not None and 0 <= padding < size:
        for row in rows:
            row[len(row) // 2] = padding
    return rows


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether two rows of logits are the same but for rounding in `dtype`."""
    bound = (1e-4 if dtype == torch.float32 else 0.05) * (1.0 + float(wanted.abs().max()))
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= bound


def _tried(model: PreTrainedModel, family: Family, head: nn.Linear) -> Family:
    """The family with scale and cap as the model has them. Raises InputError when it looks ahead or mixes rows."""
    short, long = probe_tokens(model.config, family.settings, (5, 5 + spare_tokens(family)))
    kind, dtype, device = family.model_type, head.weight.dtype, head.weight.device
    extra = without_cache(model)

    def alone(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids], device=device), **extra).logits[0].float()

    wanted = alone(long)
    if not close(alone(long[:4]), wanted[:4], dtype):
        raise InputError(
            f"--model.name: in this model of type {kind} tokens attend to later tokens, so completions have no "
            "log-probs: give a causal language model (some need is_decoder in their configuration)"
        )
    family = _with_scale(model, family, head, torch.tensor([short], device=device))
    rows = torch.tensor([[*short, *long[: len(long) - len(short)]], long], device=device)
    padded = logits_of(family, head(head_states(model, rows)))
    if not close(padded[0, : len(short)], alone(short), dtype) or not close(padded[1], wanted, dtype):
        raise InputError(
            f"--model.name: in this model of type {kind} the log-probs of a sequence depend on the rest of its batch: "
            "give another model"
        )
    return family


def _with_scale(model: PreTrainedModel, family: Family, head: nn.Linear, ids: Tensor) -> Family:
    """The family with what the model does to the logits of its output layer, found by giving it other ones.

    Its own may be too small to tell a bound from none.
    """
    values = {1.0}
    for part in (model, model.config, family.settings):
        for name in _SCALES:
            value = getattr(part, name, None)
            if isinstance(value, int | float) and value:
                values |= {float(value), 1.0 / float(value)}
    vocabulary = head.weight.shape[0]
    raw = torch.linspace(-80.0, 80.0, vocabulary, device=ids.device, dtype=head.weight.dtype)[None, None]

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return raw.expand(*hidden.shape[:-1], vocabulary).clone()

    with _instead(head, forward):
        found = model(input_ids=ids, **without_cache(model)).logits[0].float()
    given = raw[0].expand_as(found) if found.shape[-1] == vocabulary else found.new_full(found.shape, torch.nan)
    rounding = 1e-5 if head.weight.dtype == torch.float32 else 2e-2
    for scale in sorted(values, key=lambda value: abs(value - 1.0)):
        for cap in (None, *sorted(values - {1.0})):
            tried = Family(family.model_type, family.settings, family.limit, scale, cap)
            wanted = logits_of(tried, given)
            if float((found - wanted).abs().max()) <= rounding * float(wanted.abs().max()):
                return tried
    raise InputError(
        f"--model.name: this model of type {family.model_type} computes logits in a way that the loss does not "
        "support: give another model"
    )
