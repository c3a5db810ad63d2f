"""Encoding of values sent between processes: a JSON list of nodes, from which only plain data can be decoded.

None, booleans, integers, floats and text are written as they are. Every other value is a node `[kind, part, ...]`;
inside another node it is written `[number of its node]`. Shared and cyclic values therefore stay shared and cyclic, and
nothing is nested. Subclasses become their base type: a Counter a dictionary, a named tuple a tuple.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

Node = list[Any]

_SCALARS = (bool, int, float, str)
_CHANGING: dict[str, type] = {"list": list, "dict": dict, "set": set, "bytearray": bytearray}
_VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_MISSING = object()


class NotPlain(TypeError):
    """The value cannot be sent to another process."""


def pack(
    roots: Sequence[Any], known: Sequence[Any] = (), hold: Callable[[Iterator[Any]], int] | None = None
) -> tuple[list[Node], list[Any], list[Any]]:
    """Return the nodes of all objects reachable from `roots`, the roots as parts, and the object of each node.

    `known` are the objects of the first nodes; only the mutable ones are written again. An iterator is read to its end;
    with `hold` it is kept instead, and `hold` returns the number by which its next value can be requested.

    Raises:
        NotPlain: an object is not plain data.
    """
    objects = list(known)
    places = {id(thing): place for place, thing in enumerate(objects)}

    def part(value: Any) -> Any:
        if value is None or isinstance(value, _SCALARS):
            return value
        place = places.setdefault(id(value), len(objects))
        if place == len(objects):
            objects.append(value)
        return [place]

    given = [part(value) for value in roots]
    nodes: list[Node] = []
    while len(nodes) < len(objects):
        thing = objects[len(nodes)]
        is_same = len(nodes) < len(known) and not isinstance(thing, tuple(_CHANGING.values()))
        nodes.append(["same"] if is_same else _node(thing, part, hold))
    return nodes, given, objects


def _node(value: Any, part: Callable[[Any], Any], hold: Callable[[Iterator[Any]], int] | None) -> Node:
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(part, value)]
    if isinstance(value, dict):
        return ["dict", *(part(side) for pair in value.items() for side in pair)]
    if isinstance(value, bytes | bytearray):
        return ["bytearray" if isinstance(value, bytearray) else "bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, Fraction):
        return ["fraction", value.numerator, value.denominator]
    if isinstance(value, Decimal):
        return ["decimal", str(value)]
    if type(value) in _VIEWS:
        return ["view", _VIEWS[type(value)], part(dict(value.mapping))]
    if hasattr(type(value), "__next__"):
        return ["iterator", *map(part, value)] if hold is None else ["held", hold(value)]
    raise NotPlain(f"a value of the type {type(value).__name__} is not plain data")


def is_changing(node: Node) -> bool:
    """Return True if the object of a node is mutable."""
    return node[0] in _CHANGING


def unpack(
    nodes: Sequence[Node],
    given: Sequence[Any],
    known: Sequence[Any] = (),
    *,
    changed: Sequence[int] = (),
    follow: Callable[[int], Iterator[Any]] | None = None,
    finite: bool = False,
) -> tuple[list[Any], list[Any]]:
    """Return the roots, and the object of each node.

    `known` are the objects of the first nodes; those whose index is in `changed` receive the contents of their nodes.
    `follow` makes an iterator from the number of a held one. With `finite`, a number that is not finite is refused.

    Raises:
        ValueError, TypeError, IndexError, KeyError, ArithmeticError: the nodes were not made by `pack`.
    """
    objects = [*known, *[_MISSING] * (len(nodes) - len(known))]

    def value(part: Any) -> Any:
        if isinstance(part, list):
            (place,) = part
            if type(place) is not int or place < 0:
                raise ValueError("a reference to a missing value")
            return objects[place]
        if part is not None and type(part) not in _SCALARS:
            raise TypeError("a part of an unknown type")
        if finite and isinstance(part, float) and not math.isfinite(part):
            raise ValueError("a number that is not finite")
        return part

    for place in range(len(known), len(nodes)):
        if is_changing(nodes[place]):
            objects[place] = _CHANGING[nodes[place][0]]()
    begun = set[int]()
    for start in range(len(nodes)):
        waiting = [start]
        while waiting:
            place = waiting[-1]
            if objects[place] is not _MISSING:
                waiting.pop()
                continue
            missing = [part[0] for part in nodes[place][1:] if isinstance(part, list) and value(part) is _MISSING]
            if not missing:
                objects[place] = _made(nodes[place], value, follow)
            elif place in begun:
                raise ValueError("an immutable value that contains itself")
            begun.add(place)
            waiting += missing
    for place in (*changed, *range(len(known), len(nodes))):
        if is_changing(nodes[place]):
            _fill(objects[place], nodes[place], value)
    return [value(part) for part in given], objects


def _made(node: Node, value: Callable[[Any], Any], follow: Callable[[int], Iterator[Any]] | None) -> Any:
    kind, *parts = node
    if kind == "held" and follow is not None:
        return follow(int(parts[0]))
    if kind == "bytes":
        return bytes.fromhex(parts[0])
    if kind == "decimal":
        return Decimal(value(parts[0]))
    values = [value(part) for part in parts]
    if kind == "view" and isinstance(values[1], dict):
        return {"keys": values[1].keys, "values": values[1].values, "items": values[1].items}[values[0]]()
    several: dict[str, Callable[..., Any]] = {"tuple": tuple, "frozenset": frozenset, "iterator": iter}
    if kind in several:
        return several[kind](values)
    return {"complex": complex, "range": range, "fraction": Fraction}[kind](*values)


def _fill(thing: Any, node: Node, value: Callable[[Any], Any]) -> None:
    kind, *parts = node
    if not isinstance(thing, _CHANGING[kind]):
        raise TypeError("a change of the type")
    if kind == "bytearray":
        thing[:] = bytes.fromhex(parts[0])
        return
    values = [value(part) for part in parts]
    if kind == "list":
        thing[:] = values
    elif kind == "set":
        thing.clear()
        thing.update(values)
    else:
        thing.clear()
        thing.update(zip(values[::2], values[1::2], strict=True))


def line_of(message: dict[str, Any]) -> bytes:
    """Return a message as one line of JSON."""
    return json.dumps(message).encode() + b"\n"
