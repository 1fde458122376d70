"""The licence ledger: terms from texts, the chain from images to artefact, and refusal by name."""

from types import SimpleNamespace

import pytest

from teacher.errors import UsageError
from teacher.jobs.licences import (
    NOTICE,
    LicenceRefusedError,
    as_text,
    entry,
    for_label_job,
    known_licence,
    of_label_set,
    of_student,
    of_teacher,
    refuse,
    terms_of,
)

MARIGOLD = {
    "name": "marigold",
    "models": {
        "depth": {
            "repo": "prs-eth/marigold-depth-v1-1",
            "revision": "abc",
            "weights_sha256": "12",
            "licence": "not known: see the checkpoint's card",
        }
    },
    "anchor": {"repo": "depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf"},
}


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Apache-2.0", []),
        ("MIT", []),
        ("BSD-2-Clause", []),
        ("CC-BY-4.0", []),
        ("CC-BY-NC-4.0", ["non-commercial"]),
        ("CC-BY-NC-SA-4.0", ["non-commercial", "copyleft"]),
        ("FLUX.1-dev Non-Commercial", ["non-commercial"]),
        ("academic and research use only", ["non-commercial"]),
        ("CreativeML OpenRAIL++-M", ["use-restrictions"]),
        ("AGPL-3.0", ["copyleft"]),
        ("SAM License", ["custom"]),
        ("DINOv3 License", ["custom"]),
        ("terms of service: no training", ["no-training"]),
        ("House rules of ACME", ["custom"]),
        ("trail mix", ["custom"]),
        ("", ["unknown"]),
    ],
)
def test_terms_of_licence_texts(text, terms):
    assert terms_of(text) == terms


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("prs-eth/marigold-normals-v1-1@main", "OpenRAIL++-M"),
        ("depth-anything/Depth-Anything-V2-Small-hf", "Apache-2.0"),
        ("depth-anything/Depth-Anything-V2-Large-hf", "CC-BY-NC-4.0"),
        ("depth-anything/Depth-Anything-V2-Metric-Outdoor-Base-hf", "CC-BY-NC-4.0"),
        ("depth-anything/DA3METRIC-LARGE", "Apache-2.0"),
        ("depth-anything/DA3-LARGE", "CC-BY-NC-4.0"),
        ("jingheya/Lotus-2", "non-commercial"),
        ("jingheya/lotus-depth-d-v1-0", "OpenRAIL++-M"),
        ("black-forest-labs/FLUX.2-klein-4B", "Apache-2.0"),
        ("black-forest-labs/FLUX.2-klein-9B", "non-commercial"),
        ("somebody/else", ""),
    ],
)
def test_known_weights(name, part):
    assert part in known_licence(name)
    assert known_licence(name) or not part


def test_the_teacher_brings_code_weights_and_anchor():
    ledger = of_teacher(MARIGOLD)
    assert [(e["role"], e["basis"]) for e in ledger] == [
        ("teacher code", "stated"),
        ("teacher weights", "table"),
        ("anchor weights", "table"),
    ]
    assert ledger[1]["terms"] == ["use-restrictions"]
    assert ledger[2]["terms"] == ["non-commercial"]


def test_a_milder_tag_does_not_hide_what_is_known_of_the_weights():
    line = entry("teacher weights", "depth-anything/Depth-Anything-V2-Large-hf", "Apache-2.0")
    assert line["terms"] == ["non-commercial"] and line["basis"] == "stated"


def test_an_api_and_a_class_of_the_users_own():
    about = {"name": "mine.module:Painter", "endpoint": {"api": "images.example.com"}}
    ledger = of_teacher(about)
    assert [(e["role"], e["name"], e["terms"]) for e in ledger] == [
        ("teacher code", "mine.module:Painter", ["unknown"]),
        ("api terms", "images.example.com", ["unknown"]),
    ]
    about["endpoint"]["terms"] = "answers: no training of competing models"
    assert of_teacher(about)[1]["terms"] == ["no-training"]


def test_the_chain_from_images_to_artefact_names_every_ancestor(tmp_path, balls):
    """scenes -> label set of Marigold -> student with a DINOv3 backbone -> artefact's lines."""

    scenes = {"teacher": {"name": "truth"}, "licences": {"images": "Apache-2.0 (scenes)"}}
    source = SimpleNamespace(labels=SimpleNamespace(meta=scenes))
    job = for_label_job(MARIGOLD, images="scenes/", images_licence=None, source=source)
    meta = {"teacher": MARIGOLD, "licences": job, "plan_hash": "x"}
    assert of_label_set(meta) == job  # what was written is what is read: nothing doubles
    provenance = {
        "data": [{k: meta[k] for k in ("teacher", "licences", "plan_hash")}],
        "backbone_weights": "facebook/dinov3-vits16",
        "backbone_licence": "",
    }
    ledger = of_student(provenance)
    assert [(e["role"], e["name"]) for e in ledger] == [
        ("images", "images"),
        ("teacher code", "truth"),
        ("teacher code", "marigold"),
        ("teacher weights", "prs-eth/marigold-depth-v1-1"),
        ("anchor weights", "depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf"),
        ("backbone weights", "facebook/dinov3-vits16"),
    ]
    lines = as_text(ledger)
    assert lines[-1] == NOTICE and "not legal advice" in NOTICE
    assert any("marigold-depth" in x and "use-restrictions" in x for x in lines)
    assert of_student({"licences": ledger}) == ledger


def test_refusal_names_the_ancestor_and_what_to_do():
    ledger = for_label_job(MARIGOLD, images="photos/", images_licence="CC-BY-4.0")
    with pytest.raises(LicenceRefusedError, match=r"label set out/x would descend from") as caught:
        refuse(ledger, ["non-commercial"], what="label set out/x")
    text = str(caught.value)
    assert "anchor weights depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf" in text
    assert "marigold" not in text and "not legal advice" in text
    assert caught.value.exit_code == 1
    assert refuse(ledger, [], what="x") == ledger
    assert refuse(ledger, ["no-training", "unknown"], what="x") == ledger
    with pytest.raises(LicenceRefusedError, match="images images: licence unknown"):
        refuse(for_label_job(MARIGOLD, images="p", images_licence=None), ["unknown"], what="x")


def test_a_mistyped_term_is_not_taken_for_none():
    with pytest.raises(UsageError, match=r"unknown terms \['noncommercial'\]; there are .*'non-c"):
        refuse([], ["noncommercial"], what="x")


def test_the_shipped_teacher_and_the_scenes_are_free_of_terms():
    mini = {"name": "mini", "weights_sha256": "12", "license": "Apache-2.0"}
    ledger = of_label_set({"teacher": mini, "licences": {"images": "Apache-2.0 (this project)"}})
    assert [e["role"] for e in ledger] == ["images", "teacher code", "teacher weights"]
    assert all(e["terms"] == [] for e in ledger)
