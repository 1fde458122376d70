"""The licence ledger: terms from texts, the chain from images to artefact, and refusal by name."""

import json
import shutil

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
from teacher.jobs.run import label
from teacher.jobs.sources import open_source

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
        # SPDX ids and titles
        ("0BSD", []),
        ("ISC", []),
        ("MPL-2.0", []),
        ("CC0-1.0", []),
        ("MIT No Attribution", []),
        ("Apache-2.0 WITH LLVM-exception", []),
        ("Apache License, Version 2.0", []),
        ("CC BY 4.0", []),
        ("Creative Commons Attribution 4.0 International", []),
        ("CC BY SA 4.0", ["copyleft"]),
        ("CC-BY-ND-4.0", ["custom"]),
        ("Attribution-NonCommercial-ShareAlike 4.0", ["non-commercial", "copyleft"]),
        ("GPL-3.0-or-later", ["copyleft"]),
        ("GNU General Public License v3", ["copyleft"]),
        # tags of Hugging Face
        ("openrail", ["use-restrictions"]),
        ("creativeml-openrail-m", ["use-restrictions"]),
        ("bigscience-bloom-rail-1.0", ["use-restrictions"]),
        ("llama3", ["custom"]),
        ("gemma", ["custom"]),
        ("other", ["unknown"]),
        ("cc-by-nc-4.0", ["non-commercial"]),
        ("cc-by-nc-sa-4.0", ["non-commercial", "copyleft"]),
        ("flux-1-dev-non-commercial-license", ["non-commercial"]),
        ("apple-amlr", ["non-commercial", "custom"]),
        ("deepfloyd-if-license", ["non-commercial"]),
        ("stabilityai-ai-community", ["custom"]),
        ("intel-research", ["non-commercial"]),
        # sentences
        ("Not for commercial use. Complete terms at example.com", ["non-commercial"]),
        ("House rules, a complete example, sample, template, misc", ["custom"]),
        ("No commercial use", ["non-commercial"]),
        ("Commercial use is not permitted", ["non-commercial"]),
        ("For research purposes only", ["non-commercial"]),
        ("Educational and non-profit use", ["non-commercial"]),
        ("Non\u2011Commercial", ["non-commercial"]),
        ("MIT, but not commercially", ["non-commercial"]),
        ("Apache-2.0 code, weights for research use", ["non-commercial"]),
        ("Apache-2.0: no restrictions on commercial use", []),
        ("MIT, except for weapons", ["custom"]),
        # "mit" is German for "with"
        ("mit", []),
        ("mit-0", []),
        ("MIT-0", []),
        ("MIT License", []),
        ("MIT LICENSE", []),
        ("the mit licence", []),
        ("Released under MIT", []),
        ("(MIT OR Apache-2.0)", []),
        ("MIT-Lizenz", []),
        ("Daten mit Erlaubnis des Instituts", ["custom"]),
        ("Mit Genehmigung der Urheber", ["custom"]),
        ("DATEN MIT NAMENSNENNUNG", ["custom"]),
        ("Nutzung mit Angabe der Quelle", ["custom"]),
        ("mit freundlicher Unterstützung von ACME", ["custom"]),
        ("nur mit Vertrag", ["custom"]),
        ("Lizenz MIT, aber nicht für Waffen", ["custom"]),
        ("summit, permit, mitigate", ["custom"]),
        ("Answers may not be used to train models", ["no-training"]),
        ("not to be used to develop competing models", ["no-training"]),
        ("no use of output to build products that compete with us", ["no-training"]),
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
    job = for_label_job(MARIGOLD, images_licence=None, origins=[scenes])
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
    ledger = for_label_job(MARIGOLD, images_licence="CC-BY-4.0")
    with pytest.raises(LicenceRefusedError, match=r"label set out/x would descend from") as caught:
        refuse(ledger, ["non-commercial"], what="label set out/x")
    text = str(caught.value)
    assert "anchor weights depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf" in text
    assert "marigold" not in text and "not legal advice" in text
    assert caught.value.exit_code == 1
    assert refuse(ledger, [], what="x") == ledger
    assert refuse(ledger, ["no-training", "unknown"], what="x") == ledger
    with pytest.raises(LicenceRefusedError, match="images images: licence unknown"):
        refuse(for_label_job(MARIGOLD, images_licence=None), ["unknown"], what="x")


def test_a_mistyped_term_is_not_taken_for_none():
    with pytest.raises(UsageError, match=r"unknown terms \['noncommercial'\]; there are .*'non-c"):
        refuse([], ["noncommercial"], what="x")


def test_the_shipped_teacher_and_the_scenes_are_free_of_terms():
    mini = {"name": "mini", "weights_sha256": "12", "license": "Apache-2.0"}
    ledger = of_label_set({"teacher": mini, "licences": {"images": "Apache-2.0 (this project)"}})
    assert [e["role"] for e in ledger] == ["images", "teacher code", "teacher weights"]
    assert all(e["terms"] == [] for e in ledger)


def copied(truth, pictures, out, **licence):
    """A label job that copies the labels of ``truth`` to the same images."""
    return label(
        teacher={"name": "truth", "labels": str(truth)}, images=str(pictures), out=str(out),
        tasks=["depth"], max_side=None, shard_size=8, batch_size=4, keep_pictures=False,
        threads=1, licence=licence,
    )  # fmt: skip


def ledger_of(folder):
    return of_label_set(json.loads((folder / "dataset.json").read_text()))


@pytest.fixture(scope="module")
def restricted(tmp_path_factory, balls):
    """A label set of non-commercial images."""
    out = tmp_path_factory.mktemp("nc") / "set"
    copied(balls, balls, out, images="CC-BY-NC-4.0")
    return out


def test_a_statement_on_the_images_is_none_on_the_labels(restricted, tmp_path):
    """Labels copied from a set keep its terms, whatever licence.images says of the images."""
    free = {"images": "CC0-1.0", "refuse": ["non-commercial"]}
    with pytest.raises(LicenceRefusedError, match=r"truth images images: CC-BY-NC-4\.0"):
        copied(restricted, restricted, tmp_path / "set", **free)
    assert not (tmp_path / "set").exists()
    copied(restricted, restricted, tmp_path / "set", images="CC0-1.0")
    found = [(e["role"], e["licence"]) for e in ledger_of(tmp_path / "set")]
    assert ("images", "CC0-1.0") in found and ("truth images", "CC-BY-NC-4.0") in found
    with pytest.raises(LicenceRefusedError, match="truth images"):  # one more step down the chain
        copied(tmp_path / "set", tmp_path / "set", tmp_path / "next", **free)


def test_a_statement_replaces_the_images_and_nothing_else():
    origin = {"teacher": MARIGOLD, "licences": {"images": "CC-BY-NC-4.0", "sensor": "ACME rules"}}
    ledger = for_label_job({"name": "truth"}, images_licence="MIT", origins=[origin])
    assert [(e["role"], e["licence"]) for e in ledger if "teacher" not in e["role"]] == [
        ("images", "MIT"),
        ("sensor", "ACME rules"),
        ("anchor weights", "CC-BY-NC-4.0"),
    ]


def test_another_statement_on_resume_is_refused(balls, tmp_path):
    out = tmp_path / "set"
    copied(balls, balls, out, images="CC-BY-NC-4.0")
    with pytest.raises(UsageError, match=r"licence.images=MIT: .* says CC-BY-NC-4\.0 .*choose"):
        copied(balls, balls, out, images="MIT")
    assert copied(balls, balls, out, images="CC-BY-NC-4.0")["complete"]
    assert copied(balls, balls, out)["complete"]
    with pytest.raises(LicenceRefusedError, match=r"images images: CC-BY-NC-4\.0"):
        copied(balls, balls, out, refuse=["non-commercial"])


def test_a_tar_of_a_label_set_brings_the_ledger_beside_it(restricted, tmp_path):
    tar = restricted / "shard-000000.tar"
    assert of_label_set(open_source(str(tar)).origins[0]) == ledger_of(restricted)
    with pytest.raises(LicenceRefusedError, match=r"images images: CC-BY-NC-4\.0"):
        copied(restricted, tar, tmp_path / "set", refuse=["non-commercial"])
    shutil.copy(tar, tmp_path / "alone.tar")
    assert open_source(str(tmp_path / "alone.tar")).origins == [{}]
    both = tmp_path / "both"
    shutil.copytree(restricted, both / "set")
    shutil.copy(tar, both / "alone.tar")
    ledger = for_label_job(
        {"name": "truth"}, images_licence=None, origins=open_source(f"{both}/**/*.tar").origins
    )
    assert [e["licence"] for e in ledger if e["role"] == "images"] == ["", "CC-BY-NC-4.0"]


def test_a_tar_behind_a_url_brings_the_ledger_beside_it(restricted, balls, tmp_path):
    """As a local one does: by its own URL, by that of its folder, or of one above."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in restricted.iterdir():
        memory.pipe(f"/rooms/set/{path.name}", path.read_bytes())
    memory.pipe("/rooms/alone/shard.tar", (restricted / "shard-000000.tar").read_bytes())
    urls = ["memory://rooms/set/shard-000000.tar", "memory://rooms/set", f"file://{restricted}"]
    for url in [*urls, f"file://{restricted}/shard-000001.tar"]:
        assert [of_label_set(o) for o in open_source(url).origins] == [ledger_of(restricted)]
        with pytest.raises(LicenceRefusedError, match=r"from\n  images images: CC-BY-NC-4\.0"):
            copied(balls, url, tmp_path / "set", refuse=["non-commercial"])
    assert not (tmp_path / "set").exists()
    copied(balls, urls[1], tmp_path / "set", images="MIT", refuse=["non-commercial"])
    assert open_source("memory://rooms/alone").origins == [{}]
    assert len(open_source("memory://rooms").origins) == 2
    for broken in (b"{", b'{"format": "coco"}'):
        memory.pipe("/rooms/set/dataset.json", broken)
        assert open_source(urls[0]).origins == [{}]
