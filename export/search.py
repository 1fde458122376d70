"""The smallest set of fp32 islands within budget, by measuring.

Groups of nodes (`export.precision.groups_of`) are tried from "none in fp32" on. If that misses a
budget, the groups are ranked by what each costs when it alone is lowered, added as islands in that
order until every budget holds, and then taken away again one by one wherever it still holds: what
remains is minimal in the sense that no single island can be spared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Excess = Callable[
    [frozenset[str]], float
]  # islands -> the worst measure as a multiple of its budget


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was found: ``islands`` (None: not even all groups suffice) and every trial."""

    islands: tuple[str, ...] | None
    excess: float
    trail: list[dict[str, Any]] = field(default_factory=list)


def smallest_islands(groups: Sequence[str], excess: Excess) -> Search:
    """Islands out of ``groups`` so that ``excess(islands)`` is at most 1; see the module."""
    everything = frozenset(groups)
    trail: list[dict[str, Any]] = []
    known: dict[frozenset[str], float] = {}

    def measure(islands: frozenset[str]) -> float:
        if islands not in known:
            value = known[islands] = excess(islands)
            shown = round(value, 4) if math.isfinite(value) else None
            few = len(islands) <= len(everything) / 2
            told = (
                {"islands": sorted(islands)} if few else {"all_but": sorted(everything - islands)}
            )
            trail.append(told | {"excess": shown})
        return known[islands]

    if measure(frozenset()) <= 1:
        return Search(islands=(), excess=measure(frozenset()), trail=trail)
    if measure(everything) > 1:
        return Search(islands=None, excess=measure(everything), trail=trail)
    ranked = sorted(groups, key=lambda g: -measure(everything - {g}))
    chosen: list[str] = []
    for group in ranked:
        chosen.append(group)
        if measure(frozenset(chosen)) <= 1:
            break
    for group in reversed(list(chosen)):  # the cheapest of them first
        without = frozenset(chosen) - {group}
        if measure(without) <= 1:
            chosen.remove(group)
    return Search(islands=tuple(sorted(chosen)), excess=measure(frozenset(chosen)), trail=trail)
