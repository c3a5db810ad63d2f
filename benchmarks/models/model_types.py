"""Exactness of scoring and sampling for every causal language model type of transformers, with small random models.

Log-probs in every layout that the type supports, and those returned with sampled tokens, are compared with the model's
own full pass over each sequence alone. All types of the installed transformers are listed, including untested ones.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from benchmarks.models import tiny_types, type_checks
from paced_fast.errors import InputError
from paced_fast.generation.reading import reading_of
from paced_fast.policy import Policy
from paced_fast.policy.families import unshareable
from paced_fast.policy.shape import shape_of

logger = logging.getLogger(__name__)

ORDINARY = range(3, tiny_types.VOCAB - 1)
"""Tokens that are not special in any of the small models."""
EXACT, RECURRENT = 1e-5, 1e-4
"""Largest errors in nats: for float32, and for recurrent states, which a full pass sums in another order than one token
at a time. They hold for log-probs with a spread of one nat and grow with the spread."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score and sample with a small model of every type."""

    types: tuple[str, ...] = ()
    """Types to check; none means all."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of one type. `error` is the largest difference found, in nats."""

    type: str
    outcome: str
    """exact, refused, wrong, or not built."""
    layout: str = ""
    sampling: str = ""
    error: float | None = None
    bound: float | None = None
    why: str = ""


def check(model_type: str, changes: dict[str, Any] | None = None) -> Outcome:
    """Build the type and compare. Errors of a type are reported, never raised."""
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny_types.tiny_model(model_type, **(changes or {}))
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception as error:  # any error of one type must not stop the others
        return Outcome(type=model_type, outcome="not built", why=_first_line(error))
    try:
        return _compared(model_type, model)
    except InputError as error:
        return Outcome(type=model_type, outcome="refused", why=_first_line(error))
    except Exception as error:  # an unexpected error instead of an InputError
        return Outcome(type=model_type, outcome="wrong", why=f"{type(error).__name__}: {_first_line(error)}")


def built(model_type: str) -> PreTrainedModel | None:
    """Return a small model of the type; None if it cannot be built here."""
    try:
        return tiny_types.tiny_model(model_type)
    except Exception:  # `check` reports the error
        return None


def _compared(model_type: str, model: Any) -> Outcome:
    assert shape_of(model).hidden_size > 0
    policy = Policy(model, max_tokens=40)
    batch = type_checks.rollouts(ORDINARY)
    with torch.no_grad():
        wanted = type_checks.own_logprobs(model, batch)
    errors = [float((policy.logprobs(batch, 1.0) - wanted).abs().max())]
    layouts = [policy.attention.name]
    if unshareable(model.config) is None:
        for layout in type_checks.LAYOUTS:
            with type_checks.policy_of(model, layout) as other:
                errors.append(float((other.logprobs(batch, 1.0) - wanted).abs().max()))
        layouts = ["shared", "packed", "padded"]
    errors.append(type_checks.sampling_error(model, ORDINARY))
    recurrent = type_checks.is_recurrent(model)
    bound = (RECURRENT if recurrent else EXACT) * max(1.0, float(wanted.std()))
    return Outcome(
        type=model_type,
        outcome="exact" if max(errors) <= bound else "wrong",
        layout=", ".join(layouts),
        sampling=reading_of(model).kind,
        error=max(errors),
        bound=bound,
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].strip()[:300]


def outcomes(types: tuple[str, ...]) -> Iterator[Outcome]:
    """Yield the outcome of each type in turn."""
    for name in types:
        found = check(name)
        logger.info("%-26s %s %s", name, found.outcome, found.why or f"{found.layout}; error {found.error:.1e}")
        yield found


def measure(arguments: Arguments, path: Path) -> dict[str, Any]:
    """Check the types one by one."""
    torch.set_num_threads(1)
    rows = [vars(found) for found in outcomes(arguments.types or tiny_types.TYPES)]
    return {"rows": rows}
