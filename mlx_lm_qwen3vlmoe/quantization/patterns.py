"""Regular expressions from files: one clear error for what is none, and a bound on the time that matching takes.

Python's `re` tries one way to match after the other, of which a pattern such as ``(a+)+$`` has more than anybody can
wait for. `_ways` counts them, and refuses repeats of what could match in several ways. Where other repeats are many,
`_ends` follows all ways at once: from each position in a name to those where a part of the pattern can end. What it
finds is kept, so that the time is at most the pattern's length times the square of the name's.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError, description_error

if sys.version_info >= (3, 11):
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as codes
    import sre_parse as parser

_LONGEST = 2000  # characters of a pattern
_NAME = 200  # of a name: modules have shorter ones
_MOST_WAYS = 20_000_000  # for `re` to try, in less than a second: three `.*`, and some alternatives
_MOST_REPEATS = 1000
_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
_Kept = dict[tuple[int, int, int], frozenset[int]]
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    codes.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Pattern:
    """A pattern that is matched in a bounded time; raises `ValueError` for what is not supported."""

    def __init__(self, text: str):
        if len(text) > _LONGEST:
            raise ValueError(f"no more than {_LONGEST} characters long")
        self._tree: Any = parser.parse(text)
        repeats, others = _ways(self._tree)
        self._quick = re.compile(text) if math.comb(_NAME + repeats, repeats) * others <= _MOST_WAYS else None
        if self._tree.state.flags & ~re.UNICODE.value and not self._quick:
            raise ValueError("without flags, as it has many repeats")

    def match(self, name: str) -> bool:
        """Whether it matches the beginning of a name."""
        _check_length(name)
        return self._quick.match(name) is not None if self._quick else bool(_ends(self._tree, 0, 0, name, {}))

    def fullmatch(self, name: str) -> bool:
        """Whether it matches a whole name."""
        _check_length(name)
        return (
            self._quick.fullmatch(name) is not None if self._quick else len(name) in _ends(self._tree, 0, 0, name, {})
        )


def pattern(field: str, text: str) -> Pattern:
    """The pattern in a field of a description; raises `CheckpointError` for another text."""
    try:
        return _compiled(text)
    except (ValueError, re.error, RecursionError, OverflowError) as reason:
        raise description_error(field, f"a regular expression ({reason})", text) from None


def _check_length(name: str) -> None:
    if len(name) > _NAME:
        remedy = "No module of this model type has such a name. Is a file of another checkpoint in the folder?"
        raise CheckpointError(name, f"a name of at most {_NAME} characters", len(name), remedy)


@functools.lru_cache(4096)
def _compiled(text: str) -> Pattern:
    found = Pattern(text)
    found.match("")  # what `_ends` does not support
    return found


def _ways(items: Any) -> tuple[int, float]:
    """Of a sequence to match at one position: repeats of any length, and at most how many ways each choice of those."""
    repeats, others, before = 0, 1.0, ""
    for code, value in items:
        same, before = before, str(value[-1]) if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) else ""
        if before:
            least, most, body = value
            inner, ways = _ways(body)
            if most > 1 and (inner or ways > 1):
                raise ValueError("without a repeat or a choice in a repeat")
            if least < most > 1:
                if before == same:
                    raise ValueError("without the same repeat twice in a row")
                inner = 1
            repeats, others = repeats + inner, others * (ways + (least < most == 1))
        elif code is codes.BRANCH:
            found = [_ways(branch) for branch in value[1]]
            repeats += max(inner for inner, _ in found)
            others *= sum(ways for _, ways in found)
        elif code in (codes.SUBPATTERN, codes.ASSERT, codes.ASSERT_NOT):
            inner, ways = _ways(value[-1])
            repeats, others = repeats + inner, others * ways
        elif code not in (*_SINGLE, codes.AT):
            raise ValueError("without references to groups and possessive repeats")
    return repeats, others


def _ends(items: Any, index: int, start: int, name: str, kept: _Kept) -> frozenset[int]:
    """Where the items of a sequence from ``index`` on can end, if they begin at ``start``."""
    while index < len(items) and items[index][0] in _SINGLE:
        code, value = items[index]
        if start == len(name) or not _fits(code, value, name[start]):
            return frozenset()
        index, start = index + 1, start + 1
    if index == len(items):
        return frozenset((start,))
    key = id(items), index, start
    if key not in kept:
        code, value = items[index]
        ends = _item_ends(code, value, start, name, kept)
        kept[key] = frozenset().union(*(_ends(items, index + 1, end, name, kept) for end in ends))
    return kept[key]


def _item_ends(code: Any, value: Any, start: int, name: str, kept: _Kept) -> frozenset[int]:
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, body = value
        return _repeat_ends(least, most, body, start, name, kept)
    if code is codes.BRANCH:
        return frozenset().union(*(_ends(branch, 0, start, name, kept) for branch in value[1]))
    if code is codes.SUBPATTERN and not value[1] and not value[2]:
        return _ends(value[3], 0, start, name, kept)
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        direction, body = value
        begin = start if direction > 0 else start - body.getwidth()[0]
        fits = begin >= 0 and (bool(ends := _ends(body, 0, begin, name, kept)) and (direction > 0 or start in ends))
        return frozenset((start,)) if fits == (code is codes.ASSERT) else frozenset()
    if code is codes.AT:
        return frozenset((start,)) if _is_at(value, start, name) else frozenset()
    raise ValueError("without flags of groups, as it has many repeats")


def _repeat_ends(least: int, most: Any, body: Any, start: int, name: str, kept: _Kept) -> frozenset[int]:
    if max(least, 0 if most is codes.MAXREPEAT else most) > _MOST_REPEATS:
        raise ValueError(f"with no repeat of more than {_MOST_REPEATS}")
    if len(body) == 1 and body[0][0] in _SINGLE:
        end, last = start, min(len(name), start + most)
        code, value = body[0]
        while end < last and _fits(code, value, name[end]):
            end += 1
        return frozenset(range(start + least, end + 1))
    now = frozenset((start,))
    for _ in range(least):
        now = frozenset().union(*(_ends(body, 0, position, name, kept) for position in now))
    found, count = now, least
    while now and count < most:
        now = frozenset().union(*(_ends(body, 0, position, name, kept) for position in now)) - found
        found, count = found | now, count + 1
    return found


def _is_at(code: Any, position: int, name: str) -> bool:
    if code in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return position == 0
    if code in (codes.AT_END, codes.AT_END_STRING):
        return position == len(name) or (code is codes.AT_END and name[position:] == "\n")
    word = _CATEGORIES[codes.CATEGORY_WORD]
    borders = sum(0 <= at < len(name) and word(name[at]) for at in (position - 1, position)) == 1
    return borders == (code is codes.AT_BOUNDARY)


def _fits(code: Any, value: Any, character: str) -> bool:
    if code is codes.ANY:
        return character != "\n"
    if code is not codes.IN:
        return (ord(character) == value) == (code is codes.LITERAL)
    negated = value[0][0] is codes.NEGATE
    for kind, what in value[negated:]:
        if kind is codes.LITERAL:
            fits = ord(character) == what
        elif kind is codes.RANGE:
            fits = what[0] <= ord(character) <= what[1]
        else:
            fits = _CATEGORIES[what](character)
        if fits:
            return not negated
    return negated
