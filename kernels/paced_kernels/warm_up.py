"""Compilation of the kernels behind the fused operations before a run needs them: `warm_up`.

H = hidden size, V = vocabulary.
"""

import torch
from torch import Tensor

from . import _checks
from ._backend import is_torch, resolve_backend
from ._loss.engine import Guard, make_engine, make_head, shard_options
from ._loss.gradients import RowEngine
from ._loss.torch_rows import Exponentials
from ._shard import VocabShard


def warm_up(
    head_weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    with_weights: bool = True,
    with_entropy: bool = False,
    backend: str = "auto",
    shard: VocabShard | None = None,
    skipped_share: float = 0.0,
) -> None:
    """Compile every kernel that the fused operations can need for a head, by running them on two rows of zeros.

    Without it the first calls compile: about a minute altogether, and a kernel that only a long sequence needs as late
    as that sequence comes. Numbers and lengths of sequences, temperature and the other options change no kernel, nor do
    values of the weight, which stay as they are. On the reference backend there is nothing to compile.

    Args:
        head_weight: [V, H], as the operations will get it; its dtype and its strides count.
        bias: [V], if there will be one.
        with_weights: the loss will be given `weights`.
        with_entropy: entropies will be asked for (`return_entropy` or `entropy_bonus`).
        backend: as in `linear_logprobs`.
        shard: as in `linear_logprobs`; every rank of the group must then call this.
        skipped_share: as the operations will get it; above 0 the products that pass over blocks are compiled too.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    """
    _checks.check_tensor("head_weight", head_weight, 2, _checks.FLOAT_DTYPES)
    num_rows = 2
    hidden = head_weight.new_zeros(num_rows, head_weight.shape[1])
    token_ids = torch.zeros(num_rows, dtype=torch.int64, device=head_weight.device)
    _checks.check_linear_args(hidden, head_weight, token_ids, bias, 1.0, None, shard)
    _checks.check_share("skipped_share", skipped_share)
    backend = resolve_backend(backend, hidden)
    if is_torch(backend):
        return
    group, start, _ = shard_options(shard, head_weight)
    rows, live = slice(0, num_rows), torch.ones(num_rows, dtype=torch.bool, device=hidden.device)
    with Guard(hidden.device):
        head = make_head(head_weight, bias, 1.0, group, start)
        for has_entropy in (False, True) if with_entropy else (False,):
            engine = make_engine(head, hidden, token_ids, has_entropy, None, backend)
            known = engine.score(rows)
            engine.exponentials(rows, live, known)  # the backward pass of log-probs always says which rows count
            chunk = engine.exponentials(rows, live if with_weights else None)
            if has_entropy:
                engine.entropy_gradient(chunk, rows, chunk.stats.logprobs, chunk.stats.logprobs)
            if skipped_share:
                _multiply_kept(engine, chunk, rows, skipped_share)


def _multiply_kept(engine: RowEngine, chunk: Exponentials, rows: slice, share: float) -> None:
    """Run both products that pass over blocks, the second as the gradient of the weight begins and goes on."""
    kept = engine.choose(chunk, rows, chunk.factor, share)
    if kept is None:
        return
    engine.back_project(chunk.matrix, kept)
    states = engine.hidden[rows].float()
    total = torch.empty(engine.head.weight.shape, dtype=torch.float32, device=states.device)
    engine.add_outer(total, chunk.matrix, states, begins=True, kept=kept)
    engine.add_outer(total, chunk.matrix, states, kept=kept)
    engine.add_outer(total.to(engine.weight_gradient_dtype), chunk.matrix, states, begins=True, kept=kept)
