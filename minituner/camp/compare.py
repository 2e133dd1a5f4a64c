"""Comparing the value of a learner's function with the right one, and saying where they part.

    plain(np.array([1, 2]))          [1, 2]: arrays, tensors, tuples become lists, numpy's numbers Python's
    same([1, 2.0], [1, 2])           True: numbers to a relative 1e-6, everything else exactly
    difference([1, 3], [1, 2])       "entry 1: 3 is too large"     says where, never what would be right

Lesson: every notebook's exercises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

REL = 1e-6


class Wrong(Exception):
    """Raised by a check: what is wrong with the answer, in words that help."""


def plain(value: Any, depth: int = 0) -> Any:
    """The value in Python's own types, so that whole families of right answers compare equal.

    Raises:
        Wrong: the value is of a kind that no exercise asks for, or nested endlessly.
    """
    if depth > 20:
        raise Wrong("the value is nested more than 20 deep")
    if value is None or isinstance(value, bool | str | bytes):
        return value
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        return plain(value.tolist(), depth + 1)
    if isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Set):
        return {plain(item, depth + 1) for item in value}
    if isinstance(value, list | tuple | range):
        return [plain(item, depth + 1) for item in value]
    raise Wrong(f"the function returns {type(value).__name__}; numbers, texts, lists, dictionaries, arrays are wanted")


def same(mine: Any, right: Any, rel: float = REL) -> bool:
    """Whether two plain values are equal, numbers up to a relative `rel`; True and 1 are equal, "1" and 1 are not."""
    if isinstance(right, int | float) and isinstance(mine, int | float):
        try:
            return math.isclose(mine, right, rel_tol=rel, abs_tol=1e-12) or (math.isnan(mine) and math.isnan(right))
        except OverflowError:  # a whole number that no float can hold
            return bool(mine == right)
    if isinstance(right, dict) and isinstance(mine, dict):
        return mine.keys() == right.keys() and all(same(mine[key], right[key], rel) for key in right)
    if isinstance(right, list) and isinstance(mine, list):
        return len(mine) == len(right) and all(same(a, b, rel) for a, b in zip(mine, right, strict=True))
    return type(mine) is type(right) and bool(mine == right)


def difference(mine: Any, right: Any, rel: float = REL) -> str:
    """Where two plain values that are not the same first differ, in words that do not give the right one away."""
    if isinstance(right, int | float) and not isinstance(right, bool) and isinstance(mine, int | float):
        return f"{mine!r} is too {'large' if mine > right else 'small'}" if mine == mine else "it is not a number (nan)"
    if type(mine) is not type(right):
        return f"a {_kind(right)} is wanted, and this is {'nothing' if mine is None else 'a ' + _kind(mine)}"
    if isinstance(right, dict):
        return _difference_of_dicts(mine, right, rel)
    if isinstance(right, list):
        if len(mine) != len(right):
            return f"{len(right)} entries are wanted, these are {len(mine)}"
        place = next(i for i, (a, b) in enumerate(zip(mine, right, strict=True)) if not same(a, b, rel))
        return f"entry {place}: {difference(mine[place], right[place], rel)}"
    if isinstance(right, str):
        return _difference_of_texts(mine, right)
    return f"{mine!r} is not right"


def _kind(value: Any) -> str:
    kinds = {bool: "truth value", int: "number", float: "number", str: "text", dict: "dictionary"}
    return kinds.get(type(value), type(value).__name__)


def _difference_of_dicts(mine: dict[Any, Any], right: dict[Any, Any], rel: float) -> str:
    if missing := [key for key in right if key not in mine]:
        return f"the key {missing[0]!r} is missing"
    if more := [key for key in mine if key not in right]:
        return f"nobody asked for the key {more[0]!r}"
    key = next(key for key in right if not same(mine[key], right[key], rel))
    return f"{key}: {difference(mine[key], right[key], rel)}"


def _difference_of_texts(mine: str, right: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b), min(len(mine), len(right)))
    if at == len(mine):
        return f"the text is right but stops too early, after {mine[-20:]!r}"
    if at == len(right):
        return f"the text goes on where it should end: {mine[at : at + 20]!r}"
    return f"the text is right up to {mine[max(0, at - 20) : at]!r}, then yours goes on with {mine[at : at + 12]!r}"
