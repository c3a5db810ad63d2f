"""What loggers get of a metrics record: figures under train/, eval/, value/ and time/, without constants.

metrics.jsonl keeps the names of the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_NOT_CURVES = ("step", "overlap")
"""Keys of a record that do not change within a run, or are the step itself."""
_SETTINGS_OF_EVALUATION = ("samples", "max_completion_tokens", "temperature", "top_p", "seed", "prompts", "tokens")
_OF_A_SLICE = ("accuracy", "pass_at_8", "distinct_correct", "truncated_share")
_TIMES = ("seconds", "tokens_per_second", "train_seconds", "weight_sync")
_OF_THE_VALUE = ("head_loss", "head_grad_norm")
HISTOGRAM = "value/histogram"


def figures(record: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a record by the names that loggers show."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in _NOT_CURVES:
            continue
        if key == "eval" and isinstance(value, Mapping):
            found.update(_evaluation(value))
        elif key == "eval_value":
            found.update(_flat(value, "value/held_out_"))
        elif key == "memory":
            found.update(_flat(value, "time/peak_bytes/"))
        elif key == "seconds":
            found.update(_flat(value, "time/"))
        elif key in _TIMES:
            found.update(_flat({key: value}, "time/"))
        elif key.startswith("value_") or key in _OF_THE_VALUE:
            found.update(_flat({key.removeprefix("value_"): value}, "value/"))
        else:
            found.update(_flat({key: value}, "train/"))
    return found


def histograms(record: Mapping[str, object]) -> dict[str, Sequence[float]]:
    """Counts of the prompts by value, in bins of equal width from 0 to 1; empty if the run has none."""
    counts = record.get("value_histogram")
    return {HISTOGRAM: counts} if isinstance(counts, list) and counts else {}


def _evaluation(record: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key == "slices" and isinstance(value, Mapping):
            for name, figures_of in value.items():
                if isinstance(figures_of, Mapping):
                    yield from _flat({k: figures_of.get(k) for k in _OF_A_SLICE}, f"eval/slices/{name}/")
        elif key in ("pass_at_k", "maj_at_k") and isinstance(value, Mapping):
            yield from _flat({k: v for k, v in value.items() if _is_power_of_two(str(k))}, f"eval/{key}/")
        elif key in ("seconds", "tokens_per_second"):
            yield from _flat({key: value}, "time/eval_")
        elif key not in _SETTINGS_OF_EVALUATION:
            yield from _flat({key: value}, "eval/")


def _is_power_of_two(text: str) -> bool:
    return text.isdecimal() and int(text).bit_count() == 1


def _flat(value: object, prefix: str) -> Iterator[tuple[str, float]]:
    """Numbers in nested mappings; lists are no figures."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping):
                yield from _flat(inner, f"{prefix}{key}/")
            elif isinstance(inner, int | float) and not isinstance(inner, bool):
                yield f"{prefix}{key}", float(inner)
