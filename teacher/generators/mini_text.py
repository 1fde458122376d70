"""From a sentence to the mini generator's tokens: character n-grams, and colours that carry RGB.

A token is a lower-case word or number, seen as the bag of its character 3- to 5-grams hashed into
buckets (Bojanowski et al., arXiv 1607.04606), so an unknown word resembles the words it is spelled
like. A colour in any notation (``#ff8000``, ``<255, 128, 0>``, ``(255, 128, 0)``, ``orange``,
``light purple``) is one token with its RGB. No torch here.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ImageColor

NGRAM_BUCKETS = 2048
NGRAMS_PER_TOKEN = 12
MAX_COLOURS = 28

_TRIPLE = r"[<(\[]\s*\d{1,3}\s*,\s*\d{1,3}\s*,\s*\d{1,3}\s*[>)\]]"
_NAMES = sorted(ImageColor.colormap, key=len, reverse=True)
_SHADED = rf"(?:light|dark|pale|pure|solid|bright) (?:{'|'.join(_NAMES)})"
_TOKEN = re.compile(rf"#[0-9a-f]{{6}}\b|#[0-9a-f]{{3}}\b|{_TRIPLE}|{_SHADED}|[a-z]+|\d+(?:\.\d+)?")


class Tokens(NamedTuple):
    """One prompt as fixed-size arrays (see `mini_net.Text` for the batch of them)."""

    ngrams: np.ndarray
    rgb: np.ndarray
    mask: np.ndarray
    colour_at: np.ndarray
    colour_mask: np.ndarray


def parse_colour(text: str) -> tuple[int, int, int] | None:
    """The RGB (0..255) that ``text`` names, or None when it is no colour."""
    text = text.strip().lower()
    if re.fullmatch(_TRIPLE, text):
        r, g, b = (min(255, int(v)) for v in re.findall(r"\d+", text))
        return r, g, b
    shade, _, base = text.rpartition(" ")
    name = base if shade in ("pure", "solid") else text.replace(" ", "")
    if name.startswith("#") or name in ImageColor.colormap:
        return ImageColor.getrgb(name)[:3]
    if shade and base in ImageColor.colormap:
        mix = {"light": 255, "pale": 255, "bright": 255, "dark": 0}[shade]
        r, g, b = (round((v + mix) / 2) for v in ImageColor.getrgb(base)[:3])
        return r, g, b
    return None


def words(prompt: str) -> list[str]:
    """Lower-case tokens in order; a colour in any notation is one token."""
    return _TOKEN.findall(prompt.lower())


@lru_cache(maxsize=100_000)
def _buckets(word: str) -> tuple[int, ...]:
    """Buckets 1.. of a word and its n-grams, padded with 0 (= none)."""
    framed = f"^{word}$"
    grams = [framed] + [framed[i : i + n] for n in (3, 4, 5) for i in range(len(framed) - n + 1)]
    unique = list(dict.fromkeys(grams))[:NGRAMS_PER_TOKEN]
    found = [1 + zlib.crc32(g.encode()) % (NGRAM_BUCKETS - 1) for g in unique]
    return tuple(found + [0] * (NGRAMS_PER_TOKEN - len(found)))


@lru_cache(maxsize=20_000)
def tokenize(prompt: str, *, max_tokens: int) -> Tokens:
    """Arrays of one prompt; what does not fit into ``max_tokens`` is cut off at the end."""
    ngrams = np.zeros((max_tokens, NGRAMS_PER_TOKEN), np.int64)
    rgb = np.zeros((max_tokens, 4), np.float32)
    mask = np.zeros(max_tokens, bool)
    colour_at = np.zeros(MAX_COLOURS, np.int64)
    colour_mask = np.zeros(MAX_COLOURS, bool)
    colours = 0
    for i, word in enumerate(words(prompt)[:max_tokens]):
        mask[i] = True
        colour = parse_colour(word)
        if colour is None:
            ngrams[i] = _buckets(word)
            continue
        rgb[i] = [*(np.array(colour) / 127.5 - 1), 1.0]
        if colours < MAX_COLOURS:
            colour_at[colours], colour_mask[colours] = i, True
            colours += 1
    return Tokens(ngrams, rgb, mask, colour_at, colour_mask)
