"""The policy: a causal language model as hidden states plus a linear head, and the parts that make training it fast."""

from paced_fast.policy.attention import SHARED, Attention, choose_attention
from paced_fast.policy.liger import use_liger
from paced_fast.policy.loading import build_tiny, check_kind, load_model, quiet, smollm2_folder
from paced_fast.policy.lora import (
    adapt,
    adapter_state,
    has_experts,
    is_adapted,
    load_adapter_state,
    plain_buffers,
    plain_parameters,
    plain_shapes,
    plain_state,
)
from paced_fast.policy.policy import Policy, linear_options, make_policy, prepare
from paced_fast.policy.saving import PolicyFiles, StoredNames, check_loads, generation_settings, save_model

__all__ = [
    "SHARED",
    "Attention",
    "Policy",
    "PolicyFiles",
    "StoredNames",
    "adapt",
    "adapter_state",
    "build_tiny",
    "check_kind",
    "check_loads",
    "choose_attention",
    "generation_settings",
    "has_experts",
    "is_adapted",
    "linear_options",
    "load_adapter_state",
    "load_model",
    "make_policy",
    "plain_buffers",
    "plain_parameters",
    "plain_shapes",
    "plain_state",
    "prepare",
    "quiet",
    "save_model",
    "smollm2_folder",
    "use_liger",
]
