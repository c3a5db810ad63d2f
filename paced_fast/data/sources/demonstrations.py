"""Texts that a warm start imitates: a field of a row, or what its answer makes, with noise if asked for."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

from paced_fast.data.sources.faults import BadRow
from paced_fast.data.sources.fields import lookup
from paced_fast.data.sources.spec import Messages
from paced_fast.data.tasks import equation

_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def demonstration_of(name: str, data: Mapping[str, Any], prompt: str | Messages, answer: Any, where: str) -> str:
    """The text of the field `name`, or what `@answer` and `@equation` make of the answer. Raises BadRow without one."""
    if name in ("@answer", "@equation"):
        if answer is None:
            raise BadRow(f"{where} has no answer for demonstration={name}: name a field instead")
        text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
        try:
            return text if name == "@answer" else equation(str(prompt), text)
        except (ValueError, ZeroDivisionError) as error:
            raise BadRow(
                f"{where}: the answer {text!r} is not a number, which demonstration=@equation needs: drop the row"
            ) from error
    text = lookup(data, name, where, "demonstration")
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"{where}: the demonstration in {name!r} is {text!r:.80}: give text that is not empty")
    return text


def noisy(text: str, share: float, where: str) -> str:
    """Replace about `share` of the letters and digits by others of their kind; the row's name decides which."""
    draw = random.Random(f"{where}/{text}")
    return "".join(_another(one, draw) if share and draw.random() < share else one for one in text)


def _another(character: str, draw: random.Random) -> str:
    kind = next((kind for kind in _KINDS if character in kind), character)
    return draw.choice(kind.replace(character, "") or character)
