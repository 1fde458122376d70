"""Checkpoints of foreign models: a folder or a hub repository, pinned, hashed, safetensors only.

The hub is reached through `huggingface_hub` alone, which honours ``HF_HUB_OFFLINE``,
``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN``. No remote code is ever run and no pickle is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from teacher.errors import EnvironmentFailure, UsageError
from teacher.jobs.licences import known_licence

# diffusers reads this once, at its first import; every module that needs diffusers imports us first
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"

SMALL_FILES = ("json", "txt", "model")  # configs, tokenizer files
# a line of a card's front matter, with the value after it or as the first of a list below
CARD_LICENCE = r"^licen[sc]e(?:_name)?:\s*(?:-\s*)?[\"'\[]*([^\s\"'\]][^\n\"'\]]*)"
PRECISION_VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)[.-]")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk.

    Attributes:
        folder: where its files lie (a hub snapshot or the user's own folder).
        repo: ``owner/name`` on the hub, or the folder's own name; never a path of this machine.
        revision: the commit of the hub snapshot, None for a folder.
        parts: the subfolders that are used; empty for a flat checkpoint.
        licence: of the weights, as far as known.
    """

    folder: Path
    repo: str
    revision: str | None
    parts: tuple[str, ...]
    licence: str

    def weight_files(self) -> list[Path]:
        """The safetensors that are loaded, in the order of their names."""
        return _weights(self.folder, self.parts)

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """File (relative) -> SHA-256, what pins an answer to its weights."""
        return {p.relative_to(self.folder).as_posix(): _sha256(p) for p in self.weight_files()}

    def config(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint; `UsageError` when it is absent or broken."""
        path = self.folder / name
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"checkpoint {self.repo}: {name} cannot be read ({error}).") from error
        if not isinstance(found, dict):
            raise UsageError(f"checkpoint {self.repo}: {name} is not a JSON object.")
        return found

    def describe(self) -> dict[str, Any]:
        """Plain JSON for the provenance."""
        return {
            "repo": self.repo,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256,
            "licence": self.licence,
        }


def open_checkpoint(
    spec: str,
    *,
    key: str,
    parts: Sequence[str] = (),
    licences: dict[str, str] | None = None,
    extra_files: Sequence[str] = (),
) -> Checkpoint:
    """Find a checkpoint, from the hub's cache or the hub itself if need be.

    Args:
        spec: a folder, ``owner/name`` or ``owner/name@revision`` (branch, tag, commit).
        key: the config key it came from, for messages.
        parts: subfolders that must be there, each with weights or at least a config.
        licences: prefix of the repository's name -> licence of its weights.
        extra_files: further file names to fetch.

    Raises:
        UsageError: no such folder, repository or revision; wrong layout; pickled weights only.
        EnvironmentFailure: gated, offline and not cached, or the hub cannot be reached.
    """
    repo, _, revision = spec.partition("@")
    local = Path(spec).expanduser()
    if local.is_dir():
        folder, repo, commit = local, local.resolve().name, None
        own = _licences_in(folder, parts)
    elif spec.startswith(("/", ".", "~")) or spec.count("/") != 1:
        raise UsageError(
            f"{key}={spec!r}: no such folder; give a folder with a checkpoint, or a hub repository "
            "as owner/name or owner/name@revision."
        )
    else:
        folder = _download(repo, revision or None, key=key, parts=parts, extra_files=extra_files)
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision or None
        own = []
    _check_layout(folder, key=key, spec=spec, parts=parts)
    known = [text for prefix, text in (licences or {}).items() if repo.startswith(prefix)]
    licence = "; ".join(dict.fromkeys([*known[:1], *own])) or "not known: see the checkpoint's card"
    return Checkpoint(folder, repo, commit, tuple(parts), licence)


def _licences_in(folder: Path, parts: Sequence[str]) -> list[str]:
    """What a local folder tells of the licence of its weights: its card, and every name it has.

    Names: the folder's, the hub cache's above it, ``_name_or_path`` of its configs. A mild card
    does not hide what is known of a name; both are said.
    """
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    said = re.findall(CARD_LICENCE, front[1] if front else "", re.MULTILINE)
    names = [folder.resolve().name]
    names += [p[8:].replace("--", "/") for p in folder.resolve().parts if p.startswith("models--")]
    for place in (folder, *(folder / part for part in parts)):
        for config in ("config.json", "model_index.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                names.append(str(json.loads((place / config).read_text()).get("_name_or_path", "")))
    table = [known_licence(n) or known_licence(Path(n).name, folder=True) for n in names]
    silent = ("", "other", "unknown", "none")
    return [x for x in [*said, *table] if x.lower() not in silent]


def _weights(folder: Path, parts: Sequence[str]) -> list[Path]:
    where = [folder / part for part in parts] or [folder]
    found = [path for place in where for path in sorted(place.glob("*.safetensors"))]
    return [path for path in found if not PRECISION_VARIANT.search(path.name)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_layout(folder: Path, *, key: str, spec: str, parts: Sequence[str]) -> None:
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        present = sorted(p.name for p in folder.iterdir())[:12]
        raise UsageError(
            f"{key}={spec!r}: not the layout this teacher loads: no {', '.join(missing)} in it; "
            f"expected the subfolders {', '.join(parts)}, found {present}."
        )
    for place in [folder / part for part in parts] or [folder]:
        has_config = (place / "config.json").is_file()
        if has_config and not _weights(place, ()):
            pickled = sorted(p.name for pat in ("*.bin", "*.pt", "*.ckpt") for p in place.glob(pat))
            why = f"only pickled ones ({', '.join(pickled)})" if pickled else "none"
            raise UsageError(
                f"{key}={spec!r}: {place.name} has no weights as safetensors, {why}; pickles are "
                "never opened here: convert them, or take a revision that has safetensors."
            )


def _download(
    repo: str, revision: str | None, *, key: str, parts: Sequence[str], extra_files: Sequence[str]
) -> Path:
    """The snapshot folder of ``repo``; only the files that are used are fetched."""
    from huggingface_hub import errors, snapshot_download

    inside = [f"{part}/" for part in parts] or [""]
    wanted = [f"{place}*.{suffix}" for place in inside for suffix in (*SMALL_FILES, "safetensors")]
    at = f"{key}={repo if revision is None else f'{repo}@{revision}'!r}"
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["model_index.json", *wanted, *extra_files],
                ignore_patterns=["*.fp16.*", "*.bf16.*", "*.fp16-*", "*.non_ema.*"],
            )
        )
    except errors.GatedRepoError as error:
        raise EnvironmentFailure(
            f"{at}: this repository is gated. Accept its licence at its page on the hub, then log "
            "in with `hf auth login` or set HF_TOKEN; or give a folder that holds it."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{at}: the repository has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{at}: no such repository on the hub (or it is private and you are not logged in)."
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{at}: not a repository name ({error}).") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = "HF_HUB_OFFLINE is set" if _offline() else "the hub cannot be reached"
        raise EnvironmentFailure(
            f"{at}: not (wholly) in the local cache, and {offline}. Fetch it once where there is a "
            f"network (`hf download {repo}`), or give a folder that holds it."
        ) from error
    except Exception as error:  # whatever HTTP client and disk may raise: no input is to blame
        raise EnvironmentFailure(
            f"{at}: the download failed ({type(error).__name__}: {error})."
        ) from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
