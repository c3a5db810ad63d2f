"""The policy: a causal language model seen as hidden states plus a linear head, and how it is trained fast."""

from paced_fast.policy.adapters import (
    adapt,
    adapter_state,
    is_adapted,
    load_adapter_state,
    plain_parameters,
    plain_state,
)
from paced_fast.policy.attention import SHARED, Attention, choose_attention
from paced_fast.policy.liger import use_liger
from paced_fast.policy.loading import build_tiny, load_model, quiet, smollm2_folder
from paced_fast.policy.policy import Policy, make_policy, prepare

__all__ = [
    "SHARED",
    "Attention",
    "Policy",
    "adapt",
    "adapter_state",
    "build_tiny",
    "choose_attention",
    "is_adapted",
    "load_adapter_state",
    "load_model",
    "make_policy",
    "plain_parameters",
    "plain_state",
    "prepare",
    "quiet",
    "smollm2_folder",
    "use_liger",
]
