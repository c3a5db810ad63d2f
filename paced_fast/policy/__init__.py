"""The policy: a causal language model seen as hidden states plus a linear head, and how it is trained fast."""

from paced_fast.policy.attention import Attention, choose_attention
from paced_fast.policy.loading import build_tiny, load_model, quiet, smollm2_folder
from paced_fast.policy.policy import Policy

__all__ = [
    "Attention",
    "Policy",
    "build_tiny",
    "choose_attention",
    "load_model",
    "quiet",
    "smollm2_folder",
]
