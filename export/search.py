"""The smallest set of fp32 islands within budget, by measuring.

Groups of nodes (`export.precision.groups_of`) are tried from "none in fp32" on. If that misses a
budget, the groups are ranked by what each costs when it alone is lowered, added as islands in that
order until every budget holds, and then taken away again one by one wherever it still holds: what
remains is minimal in the sense that no single island can be spared. A dearer judge, if there is
one, is asked of the result, and where it is not content the same goes on from there under it.
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


def smallest_islands(
    groups: Sequence[str], excess: Excess, confirm: Excess | None = None
) -> Search:
    """Islands out of ``groups`` so that ``excess(islands)`` is at most 1; see the module.

    ``confirm``: the dearer judge; the result's excess is its own. In the trail its trials say so.
    """
    everything = frozenset(groups)
    trail: list[dict[str, Any]] = []
    measure = _noted(excess, everything, trail, {})
    chosen: list[str] = []
    judges = [measure]
    if confirm is not None:
        judges.append(_noted(confirm, everything, trail, {"confirms": True}))
    for judge in judges:
        if judge(frozenset(chosen)) <= 1:
            continue
        if judge(everything) > 1:
            return Search(islands=None, excess=judge(everything), trail=trail)
        for group in sorted(groups, key=lambda g: -measure(everything - {g})):
            if group in chosen:
                continue
            chosen.append(group)
            if judge(frozenset(chosen)) <= 1:
                break
        for group in reversed(list(chosen)):  # the cheapest of them first
            if judge(frozenset(chosen) - {group}) <= 1:
                chosen.remove(group)
    value = judges[-1](frozenset(chosen))
    return Search(islands=tuple(sorted(chosen)), excess=value, trail=trail)


def _noted(
    excess: Excess, everything: frozenset[str], trail: list[dict[str, Any]], about: dict[str, Any]
) -> Excess:
    """``excess``, asked once of each set of islands; what it said goes into ``trail``."""
    known: dict[frozenset[str], float] = {}

    def measure(islands: frozenset[str]) -> float:
        if islands not in known:
            value = known[islands] = excess(islands)
            shown = round(value, 4) if math.isfinite(value) else None
            few = len(islands) <= len(everything) / 2
            told = (
                {"islands": sorted(islands)} if few else {"all_but": sorted(everything - islands)}
            )
            trail.append(told | {"excess": shown} | about)
        return known[islands]

    return measure
