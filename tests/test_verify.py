"""`distill verify`: a good artefact passes; each planted fault is refused by task and measure."""

import json
import re
import shutil

import numpy as np
import onnx
import pytest
from export_cases import make_labels, make_student
from onnx import helper, numpy_helper

from export.budgets import default_budgets
from export.delivery import export_student
from export.report import class_table, score_table
from export.report_pictures import worst_first
from export.verify import spread, verify
from teacher.errors import UsageError
from teacher.label import Task
from teacher.store import LabelSet, hash_file

TASKS = ("depth", "normals", "semantic")


def ten_percent_far(label):
    label.values[Task.DEPTH] = (label.values[Task.DEPTH] * 1.1).astype(np.float32)
    return label


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with an export, a truth, and a teacher that sees everything 10 % too far."""
    root = tmp_path_factory.mktemp("verify")
    make_student(root / "student.safetensors", tasks=TASKS)
    export_student(checkpoint=str(root / "student.safetensors"), out=str(root / "export"))
    make_labels(root / "truth", n=3, tasks=TASKS)
    make_labels(root / "labels", n=3, tasks=TASKS, teacher="mini", change=ten_percent_far)
    return root


@pytest.fixture(scope="module")
def passed(work):
    return verify(
        export=str(work / "export"), labels=str(work / "labels"), truth=str(work / "truth"), batch=2
    )


def report_of(work, name="export"):
    return json.loads((work / name / "verify" / "report.json").read_text())


def test_a_good_export_passes(work, passed):
    assert passed["exit"] == 0 and "within every budget on 3 images" in passed["summary"]
    report = report_of(work)
    parity = report["artefacts"]["student.onnx"]["parity"]
    assert set(parity) == set(report["runs"]["student.safetensors"]["outputs"])
    assert parity["depth"]["p999"] < 1e-4 and parity["normals"]["p999"] < 0.01
    assert report["runs"]["student.onnx"]["runtime"]["providers"] == ["CPUExecutionProvider"]


def test_teacher_and_student_stand_under_one_ruler(work, passed):
    scores = report_of(work)["scores"]
    # 10 % too far everywhere: AbsRel is 0.1 by definition, and every ratio is below 1.25
    assert scores["teacher"]["truth"]["mean"]["depth"]["abs_rel"] == pytest.approx(0.1, abs=1e-3)
    assert scores["teacher"]["truth"]["mean"]["depth"]["delta1"] == 1
    for who in ("student.safetensors", "student.onnx"):
        assert set(scores[who]) == {"teacher", "truth"}
        assert scores[who]["truth"]["mean"]["normals"]["mean_deg"] > 5


def test_the_three_reports_tell_the_same(work, passed):
    folder = work / "export" / "verify"
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    number = f"{report_of(work)['scores']['student.onnx']['truth']['mean']['depth']['abs_rel']:.3f}"
    for content in (text, page):
        assert number in content and "within every budget" in content and "teacher" in content
    assert page.count("data:image/") >= 3 * 10 and "http" not in page.replace("http-equiv", "")


def test_tables_hold_boundary_f1_and_every_class(work, passed):
    report = report_of(work)
    head, *rows = score_table(report)
    at = head.index("boundary F1 ↑")
    told = {(r[0], r[1]): r[at] for r in rows}
    for who in ("student.onnx", "teacher"):
        mean = report["scores"][who]["truth"]["mean"]["depth"]["boundary_f1"]
        assert told[who, "truth"] == f"{mean:.3f}"
    head, *rows = class_table(report)
    columns = {name: [r[i] for r in rows if r[i] != "–"] for i, name in enumerate(head)}
    for who in ("student.onnx", "teacher"):
        semantic = report["scores"][who]["truth"]["set"]["semantic"]
        ious = np.array(columns[f"{who} against truth"], float)
        assert ious.mean() == pytest.approx(semantic["miou"], abs=1e-3)
        pixels = {name: str(row["truth_pixels"]) for name, row in semantic["per_class"].items()}
        assert [r[1] for r in rows] == [pixels[r[0]] for r in rows]
    counts = [int(r[1]) for r in rows]
    assert counts == sorted(counts, reverse=True) and sum(counts) == semantic["count"]
    folder = work / "export" / "verify"
    for name in ("report.md", "report.html"):
        assert "IoU of each class" in (folder / name).read_text()


def test_the_worst_images_of_every_task_take_turns():
    """Missed first; then depth's, normals', semantic's, instances' worst, then the second ones."""
    keys = [*"abcdefgh"]
    depth, normals = dict(zip(keys, range(8), strict=True)), {"b": 3.0, "c": 9.0, "d": None}
    right = {"d": 0.1, "h": 0.2, "a": 0.9}
    rows = [
        {"key": key, "depth": {"abs_rel": depth[key]}}
        | ({"normals": {"mean_deg": normals[key]}} if key in normals else {})
        | ({"semantic": {"pixel_accuracy": right[key]}} if key in right else {})
        for key in keys
    ]
    gaps = [{"a": 0.1, "e": 0.3}, {"a": 0.5, "e": 0.0}]
    result = {
        "reference": "student.safetensors",
        "keys": keys,
        "findings": [{"image": "f"}, {"image": ""}],
        "scores": {"student.safetensors": {"truth": {"rows": rows}}},
        "artefacts": {
            str(i): {"parity": {"offset": {"rows": {k: {"p999": v} for k, v in table.items()}}}}
            for i, table in enumerate(gaps)
        },
    }
    assert "".join(worst_first(result)) == "f" + "hcda" + "gbe"
    depth_only = result | {"artefacts": {"0": {"parity": {}}}, "scores": {}}
    assert "".join(worst_first(depth_only)) == "fabcdegh"


def test_judging_again_runs_nothing_and_agrees(work, passed, monkeypatch):
    first = report_of(work)
    monkeypatch.setattr("export.verify.run_artefact", None)
    monkeypatch.setattr("export.verify.open_runtime", None)
    again = verify(
        export=str(work / "export"),
        labels=str(work / "labels"),
        truth=str(work / "truth"),
        rerun=False,
    )
    assert again["exit"] == 0 and report_of(work)["scores"] == first["scores"]
    with pytest.raises(UsageError, match=r"of another student\.safetensors or of other images"):
        verify(export=str(work / "export"), labels=str(work / "labels"), rerun=False, limit=2)


# -- planted faults ----------------------------------------------------------------------------


def after(model, name, node_type, *extra):
    """Rename output ``name`` and put ``node_type(old, *extra)`` in its place."""
    for node in model.graph.node:
        node.output[:] = [f"{name}_0" if o == name else o for o in node.output]
        node.input[:] = [f"{name}_0" if i == name else i for i in node.input]
    model.graph.node.append(helper.make_node(node_type, [f"{name}_0", *extra], [name]))


def store(model, folder):
    """Write a changed graph and vouch for it, as its maker would: only judging may refuse it."""
    onnx.save(model, folder / "student.onnx")
    promise = json.loads((folder / "export.json").read_text())
    promise["artefacts"]["student.onnx"]["sha256"] = hash_file(folder / "student.onnx")
    (folder / "export.json").write_text(json.dumps(promise))


def constant(model, name, values):
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def scaled_depth(model):
    after(model, "depth", "Mul", constant(model, "k", np.float32(1.02)))


def mirrored_normals(model):
    signs = np.array([-1, 1, 1], np.float32).reshape(1, 3, 1, 1)
    after(model, "normals", "Mul", constant(model, "k", signs))


def swapped_classes(model):
    table = np.arange(8, dtype=np.int32)
    table[[1, 3]] = 3, 1
    after(model, "semantic", "Identity")
    node = model.graph.node[-1]
    node.op_type, node.input[:] = "Gather", [constant(model, "k", table), "semantic_0"]


def unsure_sky(model):
    after(model, "sky", "Mul", constant(model, "k", np.float32(0.9)))


def wrong_when_two(model):
    """Right for every number of images but two."""
    nodes = [
        helper.make_node("Shape", ["focal_px"], ["n"]),
        helper.make_node("Equal", ["n", constant(model, "two", np.array([2]))], ["is_two"]),
        helper.make_node("Cast", ["is_two"], ["is_two_f"], to=1),
        helper.make_node("Mul", ["is_two_f", constant(model, "a", np.float32(0.1))], ["extra"]),
        helper.make_node("Add", ["extra", constant(model, "one", np.float32(1))], ["factor"]),
    ]
    model.graph.node.extend(nodes)
    after(model, "depth", "Mul", "factor")


def not_a_number_in_the_dark(model):
    """0 / 0 where an image is black all over."""
    nodes = [
        helper.make_node("Cast", ["image"], ["image_f"], to=1),
        helper.make_node(
            "ReduceMax",
            ["image_f", constant(model, "axes", np.array([1, 2, 3]))],
            ["top"],
            keepdims=0,
        ),
        helper.make_node("Div", ["top", "top"], ["one"]),
        helper.make_node(
            "Unsqueeze", ["one", constant(model, "axes2", np.array([1, 2]))], ["one_map"]
        ),
    ]
    model.graph.node.extend(nodes)
    after(model, "depth", "Mul", "one_map")


FAULTS = {
    scaled_depth: r"student.onnx: depth: depth p999 is 0.02 relative, budget 0.001",
    mirrored_normals: r"student.onnx: normals: normals p999 is [\d.]+ degrees, budget 0.5",
    swapped_classes: r"student.onnx: semantic: semantic mean is [\d.]+ share of pixels",
    unsure_sky: r"student.onnx: depth: sky p999 is 0.0\d+ probability, budget 0.001",
    wrong_when_two: r"student.onnx: depth: depth other_batch is 0.\d+ relative, budget 0.001",
    not_a_number_in_the_dark: r"depth p999 \(dark\) is not finite relative, .* image covered-lens",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_faults_are_refused_by_task_and_measure(work, tmp_path, fault):
    copy = tmp_path / "export"
    shutil.copytree(work / "export", copy, ignore=shutil.ignore_patterns("verify"))
    model = onnx.load(copy / "student.onnx")
    fault(model)
    store(model, copy)
    result = verify(export=str(copy), labels=str(work / "truth"), batch=3)
    assert result["exit"] == 1 and result["summary"].startswith("REFUSED 1 of 1 artefacts")
    texts = "\n".join(f["text"] for f in result["findings"])
    assert re.search(FAULTS[fault], texts), texts
    page = (copy / "verify" / "report.html").read_text()
    assert "Missed budgets" in page and "MISSED" in page


def wide_classes(model):
    """int64 where the contract says int32: a consumer's buffers would be read as nonsense."""
    after(model, "semantic", "Cast")
    model.graph.node[-1].attribute.append(helper.make_attribute("to", onnx.TensorProto.INT64))
    out = next(o for o in model.graph.output if o.name == "semantic")
    out.type.tensor_type.elem_type = onnx.TensorProto.INT64


def told(key, value):
    """A card that says something else than the student it was made from."""

    def change(model):
        table = {p.key: p.value for p in model.metadata_props}
        assert f"dense_distill.{key}" in table
        helper.set_model_props(model, table | {f"dense_distill.{key}": json.dumps(value)})

    return change


@pytest.mark.parametrize(
    "change, text",
    [
        (wide_classes, "semantic is int64, the contract says int32"),
        (
            told("classes", {"1": "wall", "3": "floor", "7": "thing"}),
            "classes of its card is {'1': 'wall'",
        ),
        (told("precision", "int8-cpu"), "precision of its card is int8-cpu, budget fp32"),
        (told("canonical_focal_px", 1.0), "canonical_focal_px of its card is 1.0, budget"),
        (told("batch", "x"), "batch is 'x', expected a whole number of at least 1"),
        (told("height", "64"), "height is '64', expected a whole number of at least 1"),
        (told("focal_px", "x"), "focal_px is 'x', expected a positive number of pixels"),
    ],
    ids=["types", "classes", "precision", "focal", "batch", "height", "focal text"],
)
def test_a_graph_or_card_against_its_contract_is_refused(work, tmp_path, change, text):
    copy = tmp_path / "export"
    shutil.copytree(work / "export", copy, ignore=shutil.ignore_patterns("verify"))
    model = onnx.load(copy / "student.onnx")
    change(model)
    store(model, copy)
    result = verify(export=str(copy), labels=str(work / "truth"), limit=1)
    assert result["exit"] == 1
    assert text in "\n".join(f["text"] for f in result["findings"]), result["summary"]


def test_labels_that_name_a_class_otherwise_are_refused(work, passed, tmp_path, monkeypatch):
    import export_cases

    monkeypatch.setattr(export_cases, "CLASSES", {1: "wall", 3: "floor", 7: "thing"})
    make_labels(tmp_path / "other", n=3, tasks=TASKS)
    with pytest.raises(UsageError, match=r"class [13] is '(wall|floor)' there and '(wall|floor)'"):
        verify(export=str(work / "export"), labels=str(tmp_path / "other"), limit=1)
    given = {"labels": str(tmp_path / "other"), "limit": 1, "tasks": ["depth"]}
    out = str(tmp_path / "out")
    assert verify(export=str(work / "export"), out=out, **given)["exit"] == 0  # not compared


def test_the_verdict_says_what_it_does_not_cover(work, tmp_path):
    make_labels(tmp_path / "depth", n=2, tasks=("depth",))
    out = str(tmp_path / "out")
    result = verify(export=str(work / "export"), labels=str(tmp_path / "depth"), out=out)
    assert result["exit"] == 0
    assert "no labels of normals, semantic: judged by parity and consistency" in result["summary"]
    assert "no labels of normals, semantic" in (tmp_path / "out" / "report.html").read_text()
    truth = make_labels(tmp_path / "one", n=1)
    given = {"labels": str(work / "labels"), "truth": str(truth.path), "out": out}
    few = verify(export=str(work / "export"), **given)
    assert "truth lacks 2 of 3 images" in few["summary"]


def test_task_metrics_alone_also_catch_it(work, tmp_path):
    """With parity budgets out of the way, a teacher-agreeing student that got worse is refused."""
    copy = tmp_path / "export"
    shutil.copytree(work / "export", copy, ignore=shutil.ignore_patterns("verify"))
    model = onnx.load(copy / "student.onnx")
    after(model, "normals", "Mul", constant(model, "k", np.float32(-1)))
    store(model, copy)
    budgets = default_budgets()
    for task in budgets.values():
        for measures in task["fp32"]["parity"].values():
            measures.update(dict.fromkeys(measures, 1e9))
    labels = make_labels(tmp_path / "own", n=2, tasks=TASKS, change=backward)
    result = verify(export=str(copy), labels=str(labels.path), budgets=budgets)
    assert result["exit"] == 1
    assert "normals: loss of normals.mean_deg against the truth is" in result["summary"]


def backward(label):
    """Normals that an untrained student, which looks at the viewer, has nearly right."""
    label.values[Task.NORMALS][:] = (0, 0, 1)
    return label


def test_changed_stale_and_broken_files_are_refused(work, tmp_path):
    copy = tmp_path / "export"
    shutil.copytree(work / "export", copy, ignore=shutil.ignore_patterns("verify"))
    model = onnx.load(copy / "student.onnx")
    for entry in model.metadata_props:
        if entry.key.endswith("student_sha256"):
            entry.value = '"0000"'
    onnx.save(model, copy / "student.onnx")
    (copy / "broken.onnx").write_bytes(b"\x08\x01 nonsense")
    result = verify(export=str(copy), labels=str(work / "truth"), tasks=["depth"])
    texts = {(f["artefact"], f["measure"]) for f in result["findings"]}
    assert texts == {
        ("student.onnx", "sha256"),
        ("student.onnx", "sha256 of its student"),
        ("broken.onnx", "runs"),
        ("broken.onnx", "sha256"),  # and nobody vouches for it
    }
    assert result["exit"] == 1


def test_bad_use(work, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match=r"found no student\.safetensors there"):
        verify(export=str(tmp_path / "nothing"), labels=str(work / "labels"))
    with pytest.raises(UsageError, match=r"not a label set|no such folder"):
        verify(export=str(work / "export"), labels=str(tmp_path / "nothing"))
    # saves the answers that the next two judge, whichever test came before
    verify(export=str(work / "export"), labels=str(work / "labels"), truth=str(work / "truth"))
    with pytest.raises(UsageError, match=r"the student answers .*not \['flow'\]"):
        verify(
            export=str(work / "export"),
            labels=str(work / "labels"),
            tasks=["flow"],
            rerun=False,
            truth=str(work / "truth"),
        )
    make_labels(tmp_path / "others", n=1, change=rename)
    with pytest.raises(UsageError, match=r"none of the 3 held-out images is in it"):
        verify(
            export=str(work / "export"),
            labels=str(work / "labels"),
            rerun=False,
            truth=str(tmp_path / "others"),
        )
    with pytest.raises(UsageError, match=r"already holds the truth's answers"):
        verify(
            export=str(work / "export"), labels=str(work / "truth"), truth=str(tmp_path / "others")
        )


def test_one_artefact_of_an_export_is_judged_alone_or_held_to_another(work, tmp_path):
    file, out = work / "export" / "student.onnx", str(tmp_path / "out")
    shutil.copytree(work / "export", tmp_path / "two", ignore=shutil.ignore_patterns("verify"))
    shutil.copy(file, tmp_path / "two" / "again.onnx")
    promise = json.loads((tmp_path / "two" / "export.json").read_text())
    promise["artefacts"]["again.onnx"] = promise["artefacts"]["student.onnx"]
    (tmp_path / "two" / "export.json").write_text(json.dumps(promise))
    truth = str(work / "truth")
    alone = verify(export=str(file), labels=truth, out=out)
    assert alone["exit"] == 0, alone["summary"]
    file = tmp_path / "two" / "student.onnx"
    held = verify(
        export=str(file), labels=truth, out=out, reference=str(file.parent / "again.onnx")
    )
    assert held["exit"] == 0, held["summary"]
    promise["reference"]["sha256"] = "another student's"
    (tmp_path / "two" / "export.json").write_text(json.dumps(promise))
    stale = verify(export=str(file), labels=truth, out=out)
    assert [f["measure"] for f in stale["findings"]] == ["sha256 of its student"]


def test_nothing_is_judged_by_accident_and_damaged_answers_are_said_to_be(work, tmp_path):
    given = {"export": str(work / "export"), "labels": str(work / "truth"), "limit": 1}
    given["out"] = str(tmp_path / "out")
    with pytest.raises(UsageError, match=r"min_m=50 max_m=40.0: expected 0 < min_m < max_m"):
        verify(**given, min_m=50)
    assert not (tmp_path / "out").exists()  # said before anything runs
    verify(**given)
    with pytest.raises(UsageError, match=r"tasks=\[\]: nothing would be judged"):
        verify(**given, tasks=[], rerun=False)
    answers = tmp_path / "out" / "answers" / "student.onnx"
    saved = answers / "scene00.npz"
    saved.write_bytes(saved.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"scene00\.npz: a saved answer that cannot be read"):
        verify(**given, rerun=False)
    run = json.loads((answers / "run.json").read_text())
    del run["consistency"]
    for text, said in (
        (json.dumps(run), "without consistency: of an earlier version, or changed"),
        ("[]", "without broken, canonical_focal_px, "),
        ("5", "without broken, canonical_focal_px, "),
        ('{"error": "x"}', "without keys, sha256"),
    ):
        (answers / "run.json").write_text(text)
        with pytest.raises(UsageError, match=rf"run\.json: {said}"):
            verify(**given, rerun=False)
    (answers / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json: cannot be read"):
        verify(**given, rerun=False)
    shutil.copytree(work / "export", tmp_path / "e", ignore=shutil.ignore_patterns("verify"))
    (tmp_path / "e" / "b.onnx").mkdir()
    (tmp_path / "e" / "c.onnx").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"b\.onnx, c\.onnx: found a folder or a link to nothing"):
        verify(export=str(tmp_path / "e"), labels=str(work / "truth"))


def rename(label):
    label.key = "stranger"
    return label


def test_an_output_without_a_budget_is_an_error_and_no_pass(work, passed):
    budgets = default_budgets()
    del budgets["depth"]["fp32"]["parity"]["sky"]
    with pytest.raises(UsageError, match=r"no parity for output sky under depth\.fp32"):
        verify(
            export=str(work / "export"),
            labels=str(work / "labels"),
            truth=str(work / "truth"),
            rerun=False,
            budgets=budgets,
        )


@pytest.mark.parametrize(
    "part, name", [("parity", "depth"), ("loss", "depth.detla1"), ("loss", "dept.delta1")]
)
def test_a_misspelt_budget_is_an_error_and_no_pass(work, passed, part, name):
    budgets = default_budgets()
    table = budgets["depth"]["fp32"][part]
    table[name] = {**table[name], "p99": 1.0} if part == "parity" else 1.0
    with pytest.raises(UsageError, match=r"misspelt would not be checked"):
        verify(
            export=str(work / "export"),
            labels=str(work / "labels"),
            truth=str(work / "truth"),
            rerun=False,
            budgets=budgets,
        )


@pytest.mark.parametrize(
    "place, value, text",
    [
        (("fp32", "parity", "depth", "p999"), "abc", "depth.fp32.parity.depth.p999 is 'abc', exp"),
        (("fp32", "loss", "depth.delta1"), None, "loss.depth.delta1 is None, expected a number"),
        (("fp32", "image", "depth.delta1"), float("nan"), "depth.delta1 is nan, expected a number"),
        (("fp32", "strata"), 7, "depth.fp32.strata is 7, expected a table"),
        (("fp32", "parity", "depth"), 7, "depth.fp32.parity.depth: expected a table"),
    ],
)
def test_a_budget_that_is_no_number_is_an_error_and_no_pass(place, value, text):
    from export.budgets import Budgets

    table = default_budgets()
    node = table["depth"]
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(UsageError, match=re.escape(text)):
        Budgets(table, ["depth"]).parity("depth", "fp32")


def test_a_live_teacher_answers_the_judged_images_only(work, tmp_path):
    out = tmp_path / "report"
    asked = {"export": str(work / "export"), "labels": str(work / "truth"), "out": str(out)}
    teacher = {"name": "truth", "labels": str(work / "truth")}
    for limit, answered in ((1, 1), (2, 2), (None, 3)):
        result = verify(**asked, teacher=teacher, limit=limit, tasks=["depth"])
        assert result["exit"] == 0, result["summary"]
        sets = [p.parent for p in out.glob("teacher/*/dataset.json") if p.parent.name[-1] != "s"]
        assert answered in {len(LabelSet(p)) for p in sets}
    assert sorted(len(LabelSet(p)) for p in sets) == [1, 2, 3]


def test_a_teacher_can_be_named_on_the_command_line():
    from distill import cli

    given = ["export=a", "labels=b"]
    assert cli.configure("verify", given)["teacher"] is None
    assert cli.configure("verify", [*given, "teacher=mini"])["teacher"]["name"] == "mini"
    truth = cli.configure("verify", [*given, "teacher=truth", "teacher.labels=x"])["teacher"]
    assert truth == {"name": "truth", "labels": "x"}


def test_another_recorded_camera_is_no_fault(work, tmp_path):
    source, out = work / "student.safetensors", tmp_path / "export"
    export_student(checkpoint=str(source), out=str(out), focal_px=200.0)
    assert verify(export=str(out), labels=str(work / "truth"), limit=1)["exit"] == 0


def test_a_damaged_truth_and_a_foreign_out_are_refused(work, passed, tmp_path):
    arguments = {"export": str(work / "export"), "labels": str(work / "labels")}
    copy = tmp_path / "truth"
    shutil.copytree(work / "truth", copy)
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match=r"shard-000000\.tar: its content does not match"):
        verify(**arguments, truth=str(copy), rerun=False)
    photo = tmp_path / "mine" / "answers" / "inputs" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"x")
    (tmp_path / "mine" / "thesis.doc").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"found thesis\.doc, expected a new or empty folder"):
        verify(**arguments, out=str(tmp_path / "mine"))
    assert photo.exists()


def test_spread_is_even():
    assert spread(list("abcdefghij"), 3) == ["a", "d", "g"]
    assert spread(list("ab"), 3) == ["a", "b"] and spread(list("ab"), None) == ["a", "b"]


def test_config_keys_are_the_arguments():
    import inspect

    from hydra import compose, initialize_config_module

    from export.predict import predict

    with initialize_config_module("conf", version_base="1.3"):
        for verb, function in (
            ("verify", verify),
            ("export", export_student),
            ("predict", predict),
        ):
            assert set(compose(verb)) == set(inspect.signature(function).parameters), verb
        from omegaconf import OmegaConf

        assert OmegaConf.to_container(compose("verify").budgets) == default_budgets()
