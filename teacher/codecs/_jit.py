"""How every kernel of the codecs is compiled: on first use, cached on disk, free of the GIL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
        kernel = numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:
        return numba.njit(**OPTIONS)(function)
    _watch_neighbours(kernel, Path(function.__code__.co_filename).parent)
    return kernel


def _watch_neighbours(kernel: Any, folder: Path) -> None:
    """Make the cached kernel stale when any kernel file of its folder changes.

    Numba looks at the kernel's own file only, while kernels inline helpers of other files; after an
    update that touched just the helper, the old machine code would run on.
    """
    index: Any = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if hasattr(index, "_source_stamp"):
        facts = [(p.name, p.stat()) for p in sorted(folder.glob("_*.py"))]
        index._source_stamp = [(name, f.st_mtime, f.st_size) for name, f in facts]


def inline(function: Callable[..., Any]) -> Any:
    """A helper that is compiled into its callers, so that their loops become vector code."""
    return numba.njit(inline="always", **OPTIONS)(function)
