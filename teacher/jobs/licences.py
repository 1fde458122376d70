"""The licence ledger: what a label set, a student and an artefact descend from, and on what terms.

An entry is plain JSON: ``role`` (images, teacher code, teacher weights, anchor, api terms, label
set, backbone, ...), ``name``, ``licence`` (text, "" unknown), ``terms`` (see `TERMS`), ``basis``
(``stated`` by user, card or repository; ``table``: known here, see `KNOWN`; ``unknown``).

The ledger is computed along the chain: images and teacher -> label set -> student -> artefact;
each stage copies its ancestors' entries and adds its own. It is a reading aid made by a program
from names and licence texts. It is not legal advice: read the texts, ask a lawyer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from teacher.errors import UsageError

NOTICE = "Computed from names and licence texts by a program; not legal advice. Read the texts."
TERMS = {
    "non-commercial": "use is limited to non-commercial or research purposes",
    "no-training": "the terms forbid or limit training other models on the answers",
    "use-restrictions": "use restrictions that flow down to models trained on the output",
    "copyleft": "source or share-alike duties may reach what is derived",
    "custom": "a licence of its own, to be read",
    "unknown": "no licence is known",
}
# `plain` licence text -> terms; every pattern that fits counts. [^.;] stays within a sentence.
PATTERNS: tuple[tuple[str, str], ...] = (
    (
        r"\bnon ?commercial|\bnc\b|\bnon ?profit|\bnot for profit|\bamlr\b|deepfloyd"
        r"|\b(not?|never|cannot|without|prohibit\w*|forbid\w*)\b[^.;]{0,60}\bcommercial"
        r"|\bcommercial(ly)?\b[^.;]{0,40}\b(not|prohibited|forbidden|excluded|requires?)\b"
        r"|\b(research|academi\w+|education\w*|evaluation|personal|scientific)\b[^.;]{0,40}"
        r"\b(only|uses?|purposes?)\b"
        r"|\bonly\b[^.;]{0,40}\b(research|academi\w+|education\w*|evaluation|personal)\b"
        r"|\bresearch licen[sc]e|\bintel research\b",
        "non-commercial",
    ),
    (r"openrail|\brails?\b", "use-restrictions"),
    (
        r"\b[al]?gpl|general public licen[sc]e|\bshare ?alike|\bcc\b.*\bsa\b",
        "copyleft",
    ),
    (
        r"\b(not?|never|cannot|prohibit\w*|forbid\w*)\b[^.;]{0,60}"
        r"\b(train|training|distil\w*|fine ?tun\w*|improve (any )?other)\b"
        r"|\b(training|distil\w+|fine ?tuning)\b[^.;]{0,40}\b(not|prohibited|forbidden)\b"
        r"|\bcompet(e|es|ing|itive)\b[^.;]{0,40}\b(models?|products?|services?)\b"
        r"|\b(models?|products?|services?)\b[^.;]{0,40}\bcompet(e|es|ing)\b",
        "no-training",
    ),
    (
        r"\bsam licen[sc]e|\bdinov3|\bllama|\bgemma|\bnvidia open model|\bapple\b|\bstability ?ai",
        "custom",
    ),
)
PERMISSIVE = (
    r"\bapache(2(\.0)?)?\b|\b0?bsd\b|\bcc0\b|\bcc ?by\b(?! (nc|nd|sa)\b)"
    r"|\bcreative commons attribution\b(?! (no|share))|\bpublic domain\b|\bunlicense\b|\bisc\b"
    r"|\bmpl\b|\bzlib\b|\bpddl\b|\bcdla permissive\b|\bodc by\b"
)
# "mit" is a German word: the name counts in capitals, before "License", or as the whole text
MIT = r"\bMIT\b|(?i:\bmit licen[sc]e\b|^mit( 0)?$)"
# beside these words a permissive name says too little
RESTRICTING = (
    r"\b(but|except|unless|however|only|not?|never|cannot|restrict\w*|prohibit\w*|forbid\w*"
    r"|limited|permission|consent|aber|nicht|nur|kein\w*|untersagt|verboten|erlaubnis"
    r"|genehmigung)\b"
)
# left out before anything is looked for
HARMLESS = r"\bno (attribution|warranty|copyright|rights reserved|(restriction|limit)s? on)\b"
# prefix of a lower-case repository or model name -> licence; the longest prefix that fits counts
KNOWN: dict[str, str] = {
    "prs-eth/marigold": "OpenRAIL++-M (counts training on its output as a derivative)",
    "prs-eth/rollingdepth": "OpenRAIL++-M",
    "gonzalomg/marigold-e2e-ft": "OpenRAIL++-M (derived from Marigold)",
    "stabilityai/stable-diffusion-2": "CreativeML OpenRAIL++-M",
    "jingheya/lotus-2": "FLUX.1-dev non-commercial (adapters on FLUX.1-dev)",
    "jingheya/lotus-": "Apache-2.0 code; weights derive from Stable Diffusion 2 (OpenRAIL++-M)",
    "black-forest-labs/flux.1-dev": "FLUX.1-dev Non-Commercial",
    "black-forest-labs/flux.1-kontext-dev": "FLUX.1-dev Non-Commercial",
    "black-forest-labs/flux.2-dev": "FLUX.2-dev Non-Commercial",
    "black-forest-labs/flux.2-klein-4b": "Apache-2.0",
    "black-forest-labs/flux.2-klein-base-4b": "Apache-2.0",
    "black-forest-labs/flux.2-klein-9b": "FLUX non-commercial",
    "black-forest-labs/flux.2-klein-base-9b": "FLUX non-commercial",
    "funailab/open-vision-banana": "adapted from FLUX.2 klein base 9B (non-commercial)",
    "qwen/qwen-image": "Apache-2.0",
    "depth-anything/depth-anything-v2-small": "Apache-2.0",
    "depth-anything/depth-anything-v2-base": "CC-BY-NC-4.0",
    "depth-anything/depth-anything-v2-large": "CC-BY-NC-4.0",
    "depth-anything/depth-anything-v2-giant": "CC-BY-NC-4.0",
    "depth-anything/depth-anything-v2-metric-indoor-small": "Apache-2.0",
    "depth-anything/depth-anything-v2-metric-outdoor-small": "Apache-2.0",
    "depth-anything/depth-anything-v2-metric-indoor-base": "CC-BY-NC-4.0",
    "depth-anything/depth-anything-v2-metric-outdoor-base": "CC-BY-NC-4.0",
    "depth-anything/depth-anything-v2-metric-indoor-large": "CC-BY-NC-4.0",
    "depth-anything/depth-anything-v2-metric-outdoor-large": "CC-BY-NC-4.0",
    "depth-anything/da3-small": "Apache-2.0",
    "depth-anything/da3-base": "Apache-2.0",
    "depth-anything/da3mono-large": "Apache-2.0",
    "depth-anything/da3metric-large": "Apache-2.0",
    "depth-anything/da3-large": "CC-BY-NC-4.0",
    "depth-anything/da3-giant": "CC-BY-NC-4.0",
    "depth-anything/da3nested": "CC-BY-NC-4.0",
    "ruicheng/moge": "MIT",
    "lpiccinelli/unidepth": "CC-BY-NC-4.0",
    "tencent/depthcrafter": "academic and research use only",
    "apple/depthpro": "Apple AMLR (research only)",
    "facebook/sam3": "SAM License",
    "facebook/dinov3": "DINOv3 License",
    "nvidia/radio": "NVIDIA non-commercial",
    "nvidia/c-radiov4": "NVIDIA Open Model License",
}
# code of the teachers that this project ships
OWN_CODE = (
    "mini",
    "truth",
    "folder",
    "marigold",
    "lotus",
    "lotus2",
    "depth_pro",
    "depth_anything",
)
SPEAKING = ("licence", "license")


class LicenceRefusedError(UsageError):
    """An ancestor's terms are among those that the user refuses; nothing was made. Exit 1."""

    exit_code = 1


def known_licence(name: str, *, folder: bool = False) -> str:
    """The licence of a model or repository as far as the table knows it, "" if it does not.

    ``folder``: the name may be that of a folder, ``Depth-Anything-V2-Large-hf`` without its owner.
    """
    plain_name = name.split("@")[0].lower()
    fits = [prefix for prefix in KNOWN if plain_name.startswith(prefix)]
    if folder:
        ends = r"((?<=-)|(?![a-z0-9]))"  # radio-h, not radiology
        fits += [k for k in KNOWN if re.match(re.escape(k.split("/")[1]) + ends, plain_name)]
    return KNOWN[max(fits, key=len)] if fits else ""


def spaced(licence: str) -> str:
    """A licence text with one space for every run of spaces, dashes, underscores."""
    return re.sub(r"[\s_\u00ad\u2010-\u2015\u2212-]+", " ", licence).strip()


def plain(licence: str) -> str:
    """The same in lower case."""
    return spaced(licence).lower()


def names_mit(licence: str) -> bool:
    """Whether a text names the MIT licence; where all is in capitals, MIT's own say nothing."""
    text = spaced(licence)
    return bool(re.search(MIT, text if text != text.upper() else text.lower()))


def terms_of(licence: str) -> list[str]:
    """The terms that a licence text names, by `PATTERNS`; ["unknown"] when it says nothing.

    None for a name in `PERMISSIVE`, or MIT, with no word of `RESTRICTING` in the text.
    """
    text = re.sub(HARMLESS, "", plain(licence)).strip()
    found = [term for pattern, term in PATTERNS if re.search(pattern, text)]
    if found:
        return found
    if text in ("", "unknown", "other", "none"):
        return ["unknown"]
    named = re.search(PERMISSIVE, text) or names_mit(licence)
    return [] if named and not re.search(RESTRICTING, text) else ["custom"]


def entry(role: str, name: str, licence: str | None = None) -> dict[str, Any]:
    """One line of the ledger; a licence that is not stated is looked up by name."""
    stated = (licence or "").strip()
    if re.match(r"(not (known|stated)|unknown|none)\b|$", stated.lower()):
        looked_up = known_licence(name)
        basis = "table" if looked_up else "unknown"
        stated = looked_up
    else:
        basis = "stated"
    terms = terms_of(stated)
    if basis == "stated" and known_licence(name):  # what is stated may be milder than the weights
        terms = list(dict.fromkeys(terms + terms_of(known_licence(name))))
    return {"role": role, "name": name, "licence": stated, "terms": terms, "basis": basis}


def merged(*ledgers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All entries once, in order of first appearance."""
    found: dict[tuple, dict[str, Any]] = {}
    for ledger in ledgers:
        for line in ledger:
            found.setdefault((line["role"], line["name"], line["licence"]), dict(line))
    return list(found.values())


def read_ledger(value: Any, *, role: str = "") -> list[dict[str, Any]]:
    """A ledger from stored JSON: our entries, or ``{role: licence text}`` as scenes write it."""
    if isinstance(value, Mapping):
        if {"role", "name", "licence"} <= set(value):
            line = entry(str(value["role"]), str(value["name"]), str(value["licence"]))
            return [line | {"basis": value.get("basis", line["basis"])}]
        return merged(*(_of_pair(str(k), v, role) for k, v in value.items() if k != "notice"))
    if isinstance(value, list | tuple):
        return merged(*(read_ledger(v, role=role) for v in value))
    return [entry(role or "ancestor", role or "ancestor", str(value))] if value else []


def _of_pair(key: str, value: Any, role: str) -> list[dict[str, Any]]:
    return [entry(key, role or key, value)] if isinstance(value, str) else read_ledger(value)


def of_teacher(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a teacher's ``describe()`` descends from: code, weights, anchors, API, label sets.

    Looks for any part that names a repository (``repo``), an ``api``, ``weights_sha256`` or a
    licence, however deep; a part under a key with "anchor" in it is an anchor.
    """
    name = str(about.get("name", "unnamed"))
    own = name in OWN_CODE
    code = entry("teacher code", name, "Apache-2.0 (this project)" if own else about.get("code"))
    return merged([code], _parts(about, path=(), name=name))


def _parts(node: Any, *, path: tuple[str, ...], name: str) -> list[dict[str, Any]]:
    if isinstance(node, list | tuple):
        return merged(*(_parts(v, path=path, name=name) for v in node))
    if not isinstance(node, Mapping):
        return []
    anchored = any("anchor" in step for step in path)
    role = "anchor weights" if anchored else "teacher weights"
    stated = next((str(node[k]) for k in SPEAKING if node.get(k)), None)
    found = []
    if "api" in node:
        found.append(entry("api terms", str(node["api"]), str(node.get("terms") or stated or "")))
    elif "repo" in node:
        found.append(entry(role, str(node["repo"]), stated))
    elif "weights_sha256" in node or stated:
        found.append(entry(role, str(node.get("name", name)), stated))
    found += read_ledger(node.get("licences"))
    inner = [
        _parts(v, path=(*path, k), name=str(node.get("name", name)))
        for k, v in node.items()
        if k not in ("licences", "prompts", "codecs", "classes")
    ]
    return merged(found, *inner)


def of_label_set(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ledger of a label set by its ``dataset.json``; computed if it was not written down."""
    written = read_ledger(meta.get("licences"))
    return merged(written, of_teacher(meta.get("teacher", {})))


def inherited(ledger: Iterable[Mapping[str, Any]], *, images: str) -> list[dict[str, Any]]:
    """Another set's ledger for a description that becomes part of a plan: without the terms.

    Its ``images`` take the role ``images``, so that nobody takes them for those of the job, which
    ``licence.images`` speaks of.
    """
    kept = [{k: line[k] for k in ("role", "name", "licence", "basis")} for line in ledger]
    return [line | {"role": images} if line["role"] == "images" else line for line in kept]


def for_label_job(
    about: Mapping[str, Any],
    *,
    images_licence: str | None,
    origins: Sequence[Mapping[str, Any]] = ({},),
) -> list[dict[str, Any]]:
    """The ledger of a label job: its images (or the label sets they come from) and its teacher.

    Args:
        about: the teacher's description; an anchor and a calibration may stand in it.
        images_licence: as the user states it; it takes the place of what the origins say of their
            ``images``, their other ancestors stay.
        origins: ``dataset.json`` of the label sets whose images these are, {} for images of none.
    """
    found = merged(*(of_label_set(meta) for meta in origins if meta))
    if images_licence is not None:
        found = [line for line in found if line["role"] != "images"]
    if images_licence is not None or not all(origins):
        found = [entry("images", "images", images_licence), *found]
    return merged(found, of_teacher(about))


def of_student(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ledger of a student by the provenance in its checkpoint: label sets and backbone."""
    found = [read_ledger(provenance.get("licences"))]
    found += [of_label_set(data) for data in provenance.get("data", [])]
    backbone = provenance.get("backbone_weights") or provenance.get("backbone")
    licence = provenance.get("backbone_licence")
    if licence or provenance.get("backbone_weights"):
        found.append([entry("backbone weights", str(backbone), licence)])
    return merged(*found)


def as_text(ledger: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """One line per ancestor, for an artefact's metadata, with the notice last."""
    lines = [
        f"{line['role']}: {line['name']}: {line['licence'] or 'licence unknown'}"
        + (f" [{', '.join(line['terms'])}]" if line["terms"] else "")
        for line in ledger
    ]
    return (*lines, NOTICE) if lines else ()


def refuse(
    ledger: Iterable[Mapping[str, Any]], refused: Sequence[str], *, what: str
) -> list[dict[str, Any]]:
    """The ledger unchanged, or `LicenceRefusedError` that names every ancestor with such terms.

    Args:
        ledger: entries.
        refused: terms that the user does not accept, keys of `TERMS`.
        what: what would be made, for the message.
    """
    if isinstance(refused, str):
        raise UsageError(f"licence.refuse={refused}: expected a list, licence.refuse=[{refused}].")
    strange = sorted(set(refused) - set(TERMS))
    if strange:
        raise UsageError(f"licence.refuse: unknown terms {strange}; there are {sorted(TERMS)}.")
    lines = [dict(line) for line in ledger]
    bad = [line for line in lines if set(line["terms"]) & set(refused)]
    if bad:
        listed = "\n  ".join(
            f"{line['role']} {line['name']}: {line['licence'] or 'licence unknown'} "
            f"({', '.join(sorted(set(line['terms']) & set(refused)))})"
            for line in bad
        )
        raise LicenceRefusedError(
            f"licence.refuse={list(refused)}: {what} would descend from\n  {listed}\n"
            "Nothing was made. Take another ancestor, state its licence if you have one "
            f"(licence.images=...), or take the term out of licence.refuse. {NOTICE}"
        )
    return lines
