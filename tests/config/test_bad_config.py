"""Malformed settings by the thousand: each is one InputError that names the setting, none is taken in silence."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from paced_fast.config import Config, cli, flatten
from paced_fast.config.bounds import settings
from paced_fast.config.resolve import resolve
from paced_fast.data.sources import parse_source
from paced_fast.data.sources.spec import _KEYS
from paced_fast.errors import InputError


def types_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by dotted name with its annotation."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[item.name]
        inside = types_of(hint, f"{prefix}{item.name}.") if dataclasses.is_dataclass(hint) else {}
        found |= inside or {f"{prefix}{item.name}": hint}
    return found


TYPES = types_of(Config)
BOUNDS = {name: setting.bounds for name, setting in settings(Config).items() if setting.bounds is not None}


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def typos(word: str) -> Iterator[str]:
    """The word without one letter, with one twice, and with two exchanged."""
    middle = len(word) - 2
    yield word[:middle] + word[middle + 1 :]
    yield word[:middle] + word[middle] + word[middle:]
    yield word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]


def number_faults(name: str, whole: bool) -> Iterator[str]:
    low, high = BOUNDS[name]
    yield from (
        "many",
        "[1]",
        "true",
        "1,5",
        "0x10",
        "null",
        "None",
        "nan",
        "-inf",
        "",
        " ",
        f"{low - 1:.0f}",
        "-1e300",
    )
    if whole:
        yield from ("1.5", "1e3", "inf", "9" * 30, "9" * 5000)
    if math.isfinite(high):
        yield from (f"{2 * high + 1:.0f}", "1e999" if not whole else str(10**18 * 100))


def faults(name: str) -> Iterator[list[str]]:
    """Command lines with something wrong about one setting. What any text may be has no wrong type."""
    kind, given = TYPES[name], option(name)
    value = "1" if kind in (int, float) else "x"
    for typo in typos(given):
        if typo not in map(option, TYPES):
            yield [typo, value]
            yield [f"{typo}={value}"]
    if kind is bool:
        yield from ([given, text] for text in ("maybe", "1", "null", "nan", "-1", ""))
        yield from ([f"{given}={text}"] for text in ("maybe", "true"))
        return
    many = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if many else kind
    if not many:
        yield [given]
    if item in (int, float):
        yield from ([given, text] for text in number_faults(name, whole=item is int))
        yield from ([f"{given}={text}"] for text in ("many", "nan"))
    elif typing.get_origin(item) is Literal:
        wrong = ("nonsense", "null", "None", "nan", "-1", "", " ", "AUTO", "1.0")
        yield from ([given, text] for text in wrong)
        yield from ([given, f"{choice}x"] for choice in typing.get_args(item))
    else:
        yield from ([given, text] for text in ("", " ", "\t"))


def refusal(words: list[str]) -> str | None:
    """What the settings are refused for; None when they are taken."""
    try:
        resolve(cli.parse(["tiny", *words]))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_fault_of_a_setting_is_named(name: str) -> None:
    wrong = []
    for words in faults(name):
        message = refusal(words)
        named = message is not None and option(name) in message
        if not named or "\n" in (message or "") or len(message or "") > 700:
            wrong.append((words, message))
    assert not wrong


def test_there_are_about_a_thousand_and_no_setting_is_left_out() -> None:
    assert set(TYPES) == set(flatten(Config()))
    counts = {name: sum(1 for _ in faults(name)) for name in TYPES}
    assert min(counts.values()) >= 8
    assert sum(counts.values()) > 1000


@pytest.mark.parametrize("name", ["data.train", "data.eval", "warm_start.first.sources", "warm_start.second.sources"])
@pytest.mark.parametrize("spec", ["jsonl", "json:a", "jsonl:a?sede=1", "jsonl:a?size=0", "jsonl:a?format=gsm"])
def test_sources_are_read_with_the_settings(name: str, spec: str) -> None:
    message = refusal([option(name), spec])
    assert message is not None
    assert message.startswith(f"{option(name)}: source {spec!r}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.template", "Q:"], "--data.template 'Q:' must be chat, plain or text with {prompt} in it"),
        (
            ["--run-dir", "x", "qwen_math_1_5b"],
            "the preset qwen_math_1_5b comes first, before every option: train qwen_",
        ),
        (["--run-dir=x", "tiny"], "the preset tiny comes first, before every option: train tiny ..."),
        (["--run.overwrite", "tiny"], "the preset tiny comes first, before every option: train tiny ..."),
        (["--data", "x.jsonl", "tiny", "--steps", "1"], "the preset tiny comes first, before every option: train tiny"),
        (["--steps", "1", "small"], "the preset small comes first, before every option: train small ..."),
        (["--preset", "smollm2"], "--preset smollm2: the preset is the first word, before every option, as in"),
        (
            ["--preset=smolm2"],
            "--preset smolm2: unknown preset: did you mean smollm2? the presets are own, tiny, sma",
        ),
        (["--preset", "x"], "--preset x: unknown preset: the presets are own, tiny, small, smollm2, qwen_math_1_5b, "),
        (["--model.hidden-size", "97"], "--model.hidden-size 97 is not a multiple of --model.num-heads 4"),
        (
            ["--distributed.mode", "sharded", "--distributed.gradients", "whole"],
            "--distributed.gradients whole keeps all gradients on every rank, and --distributed.mode sharded splits",
        ),
        (["--run.report", "no"], "--run.report 'no': a switch takes no value: give --run.report or --run.no-report"),
        (["--no-steps", "1"], "unknown option --no-steps: did you mean --steps?"),
        (
            ["--algorithm", "tb_grop"],
            "--algorithm 'tb_grop': did you mean tb_group? the choices are paced, paced_paper,",
        ),
    ],
)
def test_what_the_remedy_is(words: list[str], message: str) -> None:
    assert message in (refusal(words) or "")


def test_values_at_the_bounds_are_taken() -> None:
    """The other side of the faults: both ends of every range pass, so a bound cannot hide in a wider refusal."""
    for name, (low, high) in BOUNDS.items():
        for value in (low, high):
            if math.isfinite(value):
                text = repr(float(value)) if TYPES[name] is float else str(int(value))
                cli._check_words([option(name), text])


NUMBER_FAULTS = {
    "size": ("0", "-1", "1.5", "ten", "nan", "inf", "null", "9" * 30, "1e3", "0x1"),
    "seed": ("-1", "1.5", "ten", "nan", "inf", "null", "9" * 30, "1e3"),
    "rows": ("5", "5:5", "6:5", "-1:5", ":-2", "1:2:3", "a:b", "nan:1", "0:1.5", "null", f"0:{'9' * 30}"),
    "share": ("0.5", "0.5:0.5", "0.6:0.5", "-0.1:1", "0:1.1", "nan:1", "0:nan", "0:inf", "a:b", "0:0.1:0.2", "null"),
    "optional": ("yes", "1", "True", "null", "nan"),
    "flip_probability": ("often", "nan", "inf", "-0.1", "1.1", "null"),
    "keep": ("(", "[0-9", "*", "(?P<a", "a{2,1}"),
    "template": ("Q:", "{promt}", "null", "nan", "-1"),
    "format": ("gsm", "GSM8K", "null", "nan", "-1", "gsm8k,math"),
    "demonstration": ("@answr", "@", "@Answer"),
    "split": ("test", "nan", "Train"),
}


def source_faults(kind: str, key: str) -> Iterator[str]:
    for typo in typos(key):
        if typo not in _KEYS[kind] and kind != "rg":  # other keys of rg are the task's own
            yield f"{typo}=1"
    yield from (key, f"{key}=", f"{key}=%20", f"{key}=%ff", f"{key}=x&{key}=x")
    if key != "split" or kind == "task":
        yield from (f"{key}={text}" for text in NUMBER_FAULTS.get(key, ()))


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in _KEYS.items() for key in keys])
def test_every_fault_of_a_source_string_is_named(kind: str, key: str) -> None:
    wrong = []
    for query in source_faults(kind, key):
        spec = f"{kind}:signed_sums?{query}"
        try:
            wrong.append((spec, parse_source(spec)))
        except InputError as error:
            message = str(error)
            if repr(spec) not in message or key not in message.replace(repr(spec), "") or "\n" in message:
                wrong.append((spec, message))
    assert not wrong


def test_source_faults_are_many() -> None:
    assert sum(1 for kind, keys in _KEYS.items() for key in keys for _ in source_faults(kind, key)) > 400
