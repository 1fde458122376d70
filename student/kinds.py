"""Whether values out of a file or a command line are what a signature promises."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def wrong_kind(signature: Any, values: Mapping[str, Any], *, where: str = "") -> str | None:
    """The first value that is not of the kind that its type hint says, in words; None if all are.

    ``signature``: a function, or a class with annotated fields; what a table holds is not looked
    at. ``where`` stands before the key, as in ``trainer.``. True and false are no numbers.
    """
    for key, kind in typing.get_type_hints(signature).items():
        if key in values and not _is_of(values[key], kind):
            found = f"{values[key]!r} ({type(values[key]).__name__})"
            return f"{where}{key}={found}: expected {_in_words(where + key, kind)}."
    return None


def _is_of(value: Any, kind: Any) -> bool:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(value, one) for one in inside)
    if kind is Any or kind is types.NoneType:
        return kind is Any or value is None
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if origin in (list, Sequence):
        return isinstance(value, (list, tuple)) and all(_is_of(v, inside[0]) for v in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(key: str, kind: Any) -> str:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_in_words(key, one) for one in inside)
    if origin in (dict, Mapping):
        return f"a table, as in {key}={{name: value}}"
    if origin in (list, Sequence):
        return f"a list, as in {key}=[..., ...], each {_in_words(key, inside[0])}"
    return "null" if kind is types.NoneType else WORDS.get(kind, "a value")
