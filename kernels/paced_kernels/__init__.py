"""Stand-alone kernels of PACED-RL: three operations that need only torch.

`linear_logprobs` and `trajectory_balance_loss` compute log-probs, the trajectory-balance loss and its gradients
directly from hidden states; the logits of a whole batch never exist at once. `PriorityTree` draws indices in
proportion to integer weights, without drift and without making the host wait. Importing this package starts no CUDA
context and reads no environment variable.
"""

from ._loss.sequences import segment_sum
from ._loss.tiles import default_workspace_bytes
from ._shard import VocabShard
from .linear_head import FusedLinearHead
from .logprobs import linear_logprobs
from .priority_tree import Bell, PriorityTree, Sample
from .reference import TBOutput
from .trajectory_balance import trajectory_balance_from_logprobs, trajectory_balance_loss
from .warm_up import warm_up

__all__ = [
    "Bell",
    "FusedLinearHead",
    "PriorityTree",
    "Sample",
    "TBOutput",
    "VocabShard",
    "default_workspace_bytes",
    "linear_logprobs",
    "segment_sum",
    "trajectory_balance_from_logprobs",
    "trajectory_balance_loss",
    "warm_up",
]
