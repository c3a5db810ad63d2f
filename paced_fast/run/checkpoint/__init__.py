"""Checkpoints: a fresh folder, hashed and renamed into place, so that a reader finds all of one or none of it.

`Saver` writes them, `newest` finds the one to resume from, `load` reads it. Nothing is pickled: reading a checkpoint
runs no code from it. `checkpoint.folder` describes the files.
"""

from paced_fast.policy.optimizer import load_optimizer_tensors, optimizer_tensors
from paced_fast.run.checkpoint.folder import folders, newest, policy_folder, step_folder, verify
from paced_fast.run.checkpoint.identity import check_identity, identity, versions
from paced_fast.run.checkpoint.load import load
from paced_fast.run.checkpoint.random_state import random_state, restore_random_state, seed_random_state
from paced_fast.run.checkpoint.save import SPREAD, Saver
from paced_fast.run.checkpoint.tensors import below, prefixed, read_tensors, tensor_shapes

__all__ = [
    "SPREAD",
    "Saver",
    "below",
    "check_identity",
    "folders",
    "identity",
    "load",
    "load_optimizer_tensors",
    "newest",
    "optimizer_tensors",
    "policy_folder",
    "prefixed",
    "random_state",
    "read_tensors",
    "restore_random_state",
    "seed_random_state",
    "step_folder",
    "tensor_shapes",
    "verify",
    "versions",
]
