"""What a user can mend, apart from what we must mend; the `distill` command maps both to exits.

Any exception with an integer ``exit_code`` is shown as its message alone, without a traceback.
"""

from __future__ import annotations


class UsageError(ValueError):
    """Bad use: says where, what was found, what was expected and what to do. Exit 2."""

    exit_code = 2


class EnvironmentFailure(RuntimeError):
    """The environment failed (disk, missing library, device) and no input is to blame. Exit 3."""

    exit_code = 3
