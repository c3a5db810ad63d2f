"""The model card of an exported policy, in Hugging Face's format: how to load it, results, data, settings, versions."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from paced_fast.config.given import in_words
from paced_fast.config.presets.changed import changed_settings
from paced_fast.config.resuming import NOT_OF_TRAINING
from paced_fast.config.saved import read_settings
from paced_fast.data.sources import parse_source
from paced_fast.errors import InputError, counted
from paced_fast.evaluation.forgetting import fallen_slices
from paced_fast.run.record.origin import newest_start

CARD_FILE = "README.md"
_BUILT_IN = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub names of the models that have a name of their own here."""
_FIGURES = {"accuracy": "accuracy (mean@{samples})", "pass_at_8": "pass@8"}


def model_card(run: Path, step: int, name: str, dtype: str = "") -> str | None:
    """The card of the policy of `run` after `step`, for a folder called `name`; None if the run's settings are gone.

    `dtype` is the type of the folder's weights, which the card names if it is given.
    """
    try:
        config = _flat(read_settings(run))
    except InputError:
        return None
    first, last, at = _evaluations(run / "metrics.jsonl", step)
    base = str(config.get("model.name"))
    card = ModelCard.from_template(
        _head(config, last, name),
        template_str="---\n{{ card_data }}\n---\n\n{{ text }}\n",
        text="\n\n".join(
            [
                f"# {_text(name)}",
                _about(config, base, step, dtype),
                _usage(name, is_chat=config.get("data.template") == "chat"),
                *_results(first, last, at),
                *_data(config),
                *_settings(config),
                *_versions(run),
            ]
        ),
    )
    return str(card)


def _head(config: Mapping[str, Any], last: Mapping[str, Any], name: str) -> ModelCardData:
    """The YAML part; results of the last evaluation as `model-index`."""
    base = str(config.get("model.name"))
    hub_id = _BUILT_IN.get(base, base)
    slices = last.get("slices") if isinstance(last.get("slices"), dict) else {}
    found = {"held-out prompts": last, **{str(key): part for key, part in sorted((slices or {}).items())}}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=data,
            dataset_config=data,
            metric_type="accuracy",
            metric_name=f"mean@{last.get('samples')}",
            metric_value=round(part["accuracy"], 4),
        )
        for data, part in found.items()
        if isinstance(part, dict) and isinstance(part.get("accuracy"), float)
    ]
    return ModelCardData(
        base_model=hub_id if base != "tiny" and in_words(base) == base and not Path(base).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=_license(base),
        tags=["reinforcement-learning", "paced-rl", str(config.get("algorithm"))],
        model_name=name,
        eval_results=results or None,
    )


def _license(base: str) -> str | None:
    """Licence in the base model's own card, from its folder or the cache of the hub; None if there is no such card."""
    path = Path(base).expanduser() / CARD_FILE
    if not path.is_file():
        cached = None
        with contextlib.suppress(ValueError):  # no name of a repository
            cached = try_to_load_from_cache(_BUILT_IN.get(base, base), CARD_FILE)
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    try:
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()["license"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return found if isinstance(found, str) else None


def _about(config: Mapping[str, Any], base: str, step: int, dtype: str) -> str:
    steps = config.get("steps")
    what = "a model made from scratch" if base == "tiny" else f"`{_BUILT_IN.get(base, base)}`"
    what = what if in_words(base) == base else str(in_words(base))
    so_far = (
        f"{step:,} of {counted(steps, 'step')}" if isinstance(steps, int) and step < steps else counted(step, "step")
    )
    return (
        f"The policy of a run of `paced_fast`: {what} after {so_far} of the algorithm `{config.get('algorithm')}` "
        f"(preset `{config.get('preset')}`, seed {config.get('seed')}). Trained by PACED-RL, arXiv 2602.12642: "
        "trajectory balance whose learned log Z estimates the accuracy of every prompt and chooses the prompts."
        + (f" The weights are in {dtype}." if dtype else "")
    )


def _usage(name: str, *, is_chat: bool) -> str:
    folder = name.replace("\\", "/")
    inputs = 'tokenizer("PROMPT", return_tensors="pt")'
    if is_chat:
        chat = '[{"role": "user", "content": "PROMPT"}]'
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        inputs = f"tokenizer.apply_chat_template({chat}, {options})"
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```

`vllm serve {folder}` serves it."""


def _results(first: Mapping[str, Any], last: Mapping[str, Any], at: int) -> Iterator[str]:
    if not last:
        return
    headline = last.get("headline") or []
    of = f"slices {', '.join(map(_text, headline))}" if headline else "all held-out prompts"
    rows: list[Sequence[str]] = []
    for key, words in _FIGURES.items():
        label = words.format(samples=last.get("samples"))
        rows.append([label, _figure(first, key), _figure(last, key)])
    for name, part in sorted((last.get("slices") or {}).items()):
        before = (first.get("slices") or {}).get(name) or {}
        rows.append([f"slice {_text(name)}: accuracy", _figure(before, "accuracy"), _figure(part, "accuracy")])
    yield "## Results"
    yield f"Held-out prompts before training and after step {at:,}, with 95 % intervals over prompts. Headline: {of}."
    yield _table(["figure", "before", "after"], [row for row in rows if set(row[1:]) != {"-"}])
    falls = fallen_slices(first, last) if first is not last else []
    if falls:
        yield "Forgetting: " + "; ".join(_text(str(fall)) for fall in falls) + "."
    yield "`report.html` beside this card has the curves, where the run wrote one."


def _data(config: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data"
    yield _table(
        ["use", "source", "reward"],
        [
            [use, *map(_named, (str(source), _reward(config, str(source))))]
            for use, key in (("training", "data.train"), ("held out", "data.eval"))
            for source in config.get(key) or ()
        ],
    )


def _reward(config: Mapping[str, Any], source: str) -> str | None:
    """The reward of a source: its own, else that of the run; None if neither names one."""
    own = None
    with contextlib.suppress(InputError):  # of a version with other keys
        own = parse_source(source).reward
    return own or config.get("reward.name")


def _named(value: str | None) -> str:
    """A name that the user typed, as code; what Python handed over, in words."""
    words = in_words(value)
    return "by the format of the rows" if value is None else _text(f"`{value}`" if words == value else str(words))


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    differing, _ = changed_settings(config)
    changed = {name: both for name, both in differing.items() if not name.startswith(NOT_OF_TRAINING)}
    yield "## Settings"
    if not changed:
        yield f"Those of preset `{config.get('preset')}`."
        return
    yield f"Those of preset `{config.get('preset')}`, except:"
    yield _table(
        ["setting", "preset", "this run"],
        [[f"`{name}`", _setting(default), _setting(value)] for name, (default, value) in changed.items()],
    )


def _setting(value: object) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "none" if value is None else _text(words) or "none"


def _versions(run: Path) -> Iterator[str]:
    start = newest_start(run)
    if start:
        yield "## Versions"
        yield _table(["", ""], [[_text(k), _text(str(v))] for k, v in start.items() if v is not None and k != "host"])


def _evaluations(path: Path, step: int) -> tuple[Mapping[str, Any], Mapping[str, Any], int]:
    """The first evaluation, the last one up to `step`, and its step; empty ones if there are none."""
    found: list[tuple[int, Mapping[str, Any]]] = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError):
                record = json.loads(line)
                if isinstance(record["eval"], dict) and record["step"] <= step:
                    found.append((record["step"], record["eval"]))
    return (found[0][1], found[-1][1], found[-1][0]) if found else ({}, {}, 0)


def _figure(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, float):
        return "-"
    ends = record.get(f"{key}_interval")
    if key == "pass_at_8":
        ends = (record.get("pass_at_k_interval") or {}).get("8")
    limits = f" [{ends[0]:.1%}, {ends[1]:.1%}]" if isinstance(ends, list) and len(ends) == 2 else ""
    return f"{value:.1%}{limits}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Text of a run in a cell of Markdown."""
    return re.sub(r"\s+", " ", text.replace("|", "\\|").replace("<", "&lt;"))


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
