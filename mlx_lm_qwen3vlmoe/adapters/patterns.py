"""The regular expressions of ``rank_pattern`` and ``alpha_pattern``, matched in steps whose number has a bound.

They come from a file, and `re` can be made to look for a match for ever. Here, a pattern is a chain of steps, each from
the positions in a name that can be reached to those that can be reached next, so that none is reached twice. It holds
what names of modules are written with: characters and sets of them, alternatives, groups, and repetitions of one
character.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Step = Callable[[str, set[int]], set[int]]

_LONGEST = 1000  # characters
_ONE = re.compile(r"\[\^?\]?(?:\\[dDwWsS\W]|[^\]\\])*\]|\\[dDwWsS\W_]|[^\\()\[\]|*+?{}^$]")  # what stands for one
_TIMES = re.compile(r"([*+?]|\{(\d{1,3})(,?)(\d{0,3})\})\??")
_BOUNDS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Pattern:
    """A pattern as PEFT uses it: it matches a whole name, or what follows a dot of it.

    Raises:
        ValueError: it is none of the kind above.
    """

    def __init__(self, text: str):
        if len(text) > _LONGEST:
            raise ValueError("too long")
        self.text, self.at = text, 0
        self._step = self._alternatives(0)
        if self.at < len(text):
            raise ValueError("a parenthesis that closes nothing")

    def matches(self, name: str) -> bool:
        starts = {0} | {dot + 1 for dot, character in enumerate(name) if character == "."}
        return len(name) in self._step(name, starts)

    def _alternatives(self, depth: int) -> Step:
        if depth > 10:
            raise ValueError("groups too deep in each other")
        found = [self._sequence(depth)]
        while self._next("|"):
            found.append(self._sequence(depth))
        return lambda name, starts: set().union(*(step(name, starts) for step in found))

    def _sequence(self, depth: int) -> Step:
        steps: list[Step] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            steps.append(self._piece(depth))

        def chain(name: str, starts: set[int]) -> set[int]:
            for step in steps:
                if starts:
                    starts = step(name, starts)
            return starts

        return chain

    def _piece(self, depth: int) -> Step:
        if self._next("^"):
            return lambda name, starts: starts & {0}
        if self._next("$"):
            return lambda name, starts: starts & {len(name)}
        if self._next("("):
            if self._next("?") and not self._next(":"):
                raise ValueError("an extension of groups")
            group = self._alternatives(depth + 1)
            if not self._next(")"):
                raise ValueError("a parenthesis that is not closed")
            if self._next("?"):
                return lambda name, starts: starts | group(name, starts)
            if _TIMES.match(self.text, self.at):
                raise ValueError("a group that is repeated")
            return group
        if not (match := _ONE.match(self.text, self.at)):
            raise ValueError("a character that means something else")
        self.at = match.end()
        return self._times(re.compile(match[0]))

    def _times(self, one: re.Pattern[str]) -> Step:
        """A character, as often as what follows it says."""
        least: int = 1
        most: int | None = 1
        if match := _TIMES.match(self.text, self.at):
            self.at = match.end()
            if match[1] in _BOUNDS:
                least, most = _BOUNDS[match[1]]
            else:
                least = int(match[2])
                most = least if not match[3] else int(match[4]) if match[4] else None
        if most is not None and most < least:
            raise ValueError("bounds the wrong way around")

        def repeat(name: str, starts: set[int]) -> set[int]:
            found = set(starts) if least == 0 else set()
            for number in range(1, (len(name) if most is None else most) + 1):
                starts = {start + 1 for start in starts if start < len(name) and one.match(name, start)}
                if number >= least:
                    starts = starts - found if most is None else starts
                    found |= starts
                if not starts:
                    break
            return found

        return repeat

    def _next(self, character: str) -> bool:
        """Whether a character stands here, which is then passed."""
        here = self.text.startswith(character, self.at)
        self.at += here
        return here
