"""How every kernel of the codecs is compiled: on first use, cached on disk, free of the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# NaN and infinity carry meaning here, so only the fast-math flags that keep them are set.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp"},
}


def jit(function: Callable[..., Any]) -> Any:
    """``numba.njit`` with the options above and a disk cache wherever one can be written.

    Numba caches next to the source, or in the user's cache folder when the installation is
    read-only; where neither can be written it refuses, and the kernel then lives in memory only.
    """
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:
        return numba.njit(**OPTIONS)(function)


def inline(function: Callable[..., Any]) -> Any:
    """A helper that is compiled into its callers, so that their loops become vector code."""
    return numba.njit(inline="always", **OPTIONS)(function)
