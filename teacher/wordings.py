"""What is said to a generator: the requests of `wordings.json`, and those that it must refuse.

Tuning draws from the templates, whose slots in braces are filled from lists, and from the
sentences, which were written one by one for their vocabulary. The held-out ones are never seen by
it, so that "wordings never seen in training" can be measured; each list of them says when it was
written. Any change raises the file's version, which label sets record.
"""

from __future__ import annotations

import json
from pathlib import Path

_FILE = json.loads((Path(__file__).parent / "wordings.json").read_text(encoding="utf-8"))

VERSION: int = _FILE["version"]
SLOTS: dict[str, list[str]] = _FILE["slots"]
OPENERS: list[str] = _FILE["openers"]
"""Said before a request, whatever it asks: politeness must not decide what is understood."""
TEMPLATES: dict[str, list[str]] = _FILE["templates"]
"""Per kind of request; the first one is asked where nothing is drawn at random."""
SENTENCES: dict[str, list[str]] = _FILE["sentences"]
HELD_OUT: list[dict[str, list[str]]] = [part["texts"] for part in _FILE["held_out"]]
