"""TensorRT without TensorRT: every name against the real wheels, all that is around the builder."""

import ast
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from export_cases import hand_made, make_student
from onnx import TensorProto, helper
from trt_stub import VERSIONS, StubTensorRT, names_of

from export import trt_engine
from export.artefact import ArtefactError
from export.cuda import Cuda
from export.delivery import export_student
from export.runtimes import open_runtime
from export.trt_engine import HARDWARE, build, cache_path
from export.trt_known_bad import TABLE, consult, has_attention
from export.trt_sidecar import (
    Profile,
    check_machine,
    checked_bytes,
    path_of,
    read_sidecar,
    record_acceptance,
)
from teacher.errors import EnvironmentFailure, UsageError

ROOT = Path(__file__).resolve().parents[1]
ORIN = ("Orin", "8.7")
# variable (or attribute of self) in our source -> the TensorRT class that it holds
HOLDS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "e": "ParserError",
    "self.runtime": "Runtime",
    "self.engine": "ICudaEngine",
    "self.context": "IExecutionContext",
}


def used_names(source):
    """(class, name) of every TensorRT name in a source; class "" is the module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):  # what we override must be there to be overridden
            bases = [b.attr for b in node.bases if ast.unparse(b).startswith("trt.")]
            own = [f.name for f in node.body if isinstance(f, ast.FunctionDef)]
            found |= {(b, name) for b in bases for name in own if name != "__init__"}
        if not isinstance(node, ast.Attribute):
            continue
        holder = ast.unparse(node.value)
        if holder == "trt" and not node.attr.startswith("__"):
            found.add(("", node.attr))
        elif holder.startswith("trt.") and not node.attr.startswith("__"):
            found.add((holder.removeprefix("trt."), node.attr))
        elif holder in HOLDS:
            found.add((HOLDS[holder], node.attr))
        elif holder == "config.get_timing_cache()":
            found.add(("ITimingCache", node.attr))
    return found


def missing(used, version):
    return sorted(f"{k}.{n}" for k, n in used if n not in names_of(version, k))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensorrt_name_in_our_source_exists_in_the_real_bindings(version):
    files = sorted((ROOT / "export").glob("trt_*.py"))
    used = set().union(*(used_names(f.read_text()) for f in files))
    assert len(used) > 30  # the extraction sees what is there
    assert missing(used, version) == []


def test_the_extraction_would_see_a_name_that_is_gone():
    used = used_names("config.set_flag(trt.BuilderFlag.FP16)\nself.engine.max_batch_size")
    assert missing(used, "10.3.0") == ["ICudaEngine.max_batch_size"]
    assert missing(used, "11.4.0.106") == ["BuilderFlag.FP16", "ICudaEngine.max_batch_size"]
    used = used_names("class A(trt.IProfiler):\n def report_time(self): ...")
    assert missing(used, "10.3.0") == ["IProfiler.report_time"]


def test_no_precision_flag_is_used_anywhere():
    text = "".join(f.read_text() for f in (ROOT / "export").glob("*.py"))
    for gone in ("BuilderFlag.FP16", "BuilderFlag.INT8", "BuilderFlag.BF16", "EXPLICIT_BATCH"):
        assert gone not in text


def test_hardware_levels_exist_in_some_release():
    for level in HARDWARE.values():
        assert any(level in names_of(v, "HardwareCompatibilityLevel") for v in VERSIONS)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """``made(version, ...)`` builds tmp/a.engine with a stub of that release: (sidecar, stub)."""
    hand_made(tmp_path / "a.onnx", precision="fp16")

    def run(version, *, stub=None, **options):
        trt = stub or StubTensorRT(version)
        monkeypatch.setattr(trt_engine, "import_tensorrt", lambda: trt)
        engine = tmp_path / "a.engine"
        return build(tmp_path / "a.onnx", engine, device=ORIN, **options), trt

    return run


@pytest.mark.parametrize("version", VERSIONS)
def test_one_code_path_builds_on_every_release(made, tmp_path, version):
    sidecar, trt = made(version, profile=(1, 2, 4), workspace_mib=64)
    calls = {(k, n): a for k, n, a, _ in trt.calls}
    strongly = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert calls["Builder", "create_network"] == (1 << int(strongly),)
    assert calls["IBuilderConfig", "clear_flag"][0].name == "TF32"
    kind, size = calls["IBuilderConfig", "set_memory_pool_limit"]
    assert kind.name == "WORKSPACE" and size == 64 << 20
    shapes = [a for k, n, a, _ in trt.calls if n == "set_shape"]
    assert ("image", (1, 16, 24, 3), (2, 16, 24, 3), (4, 16, 24, 3)) in shapes
    assert ("focal_px", (1,), (2,), (4,)) in shapes
    assert ("IBuilderConfig", "add_optimization_profile") in calls
    assert not [c for c in trt.calls if c[1] == "set_flag"]  # no precision, nothing else asked
    assert (tmp_path / "a.engine").read_bytes() == b"plan"  # clean: nothing of ours in it
    assert "WARNING: parsed" in (tmp_path / "a.engine.log").read_text()
    told = json.loads((tmp_path / "a.engine.json").read_text())
    assert told["tensorrt"] == version and told["gpu"] == "Orin" and told["precision"] == "fp16"
    assert told["engine"]["sha256"] == hashlib.sha256(b"plan").hexdigest()
    assert told["profile"] == {"smallest": 1, "best": 2, "largest": 4}
    assert read_sidecar(tmp_path / "a.engine") == sidecar
    assert sidecar.card_of().outputs == ("depth",)


def test_a_fixed_batch_is_its_own_profile(tmp_path, made):
    hand_made(tmp_path / "a.onnx", batch=3)
    sidecar, _ = made("10.3.0", profile=(1, 1, 8))
    assert sidecar.profile == Profile(smallest=3, best=3, largest=3)


def test_the_timing_cache_is_reused_by_the_same_device_version_and_flags_only(made, tmp_path):
    made("10.3.0")
    _, again = made("10.3.0")
    assert ("ITimingCache", "from", (b"+timed",), {}) in again.calls
    assert [k for _, n, _, k in again.calls if n == "set_timing_cache"] == [
        {"ignore_mismatch": False}
    ]
    _, other = made("11.4.0.106")
    assert ("ITimingCache", "from", (b"",), {}) in other.calls
    keys = {
        cache_path(tmp_path, version=v, gpu=g, options=o)
        for v, g, o in (
            ("10.3", "a", {}),
            ("10.3", "b", {}),
            ("11.0", "a", {}),
            ("10.3", "a", {"x": 1}),
        )
    }
    assert len(keys) == 4


def test_compatibility_options(made):
    sidecar, trt = made("10.12.0.36", version_compatible=True, hardware="same compute")
    assert any(n == "set_flag" and a[0].name == "VERSION_COMPATIBLE" for _, n, a, _ in trt.calls)
    levels = [a[0].name for _, n, a, _ in trt.calls if n == "hardware_compatibility_level"]
    assert levels == ["SAME_COMPUTE_CAPABILITY"] and sidecar.hardware == "same compute"
    with pytest.raises(UsageError, match=r"'same compute': TensorRT 10\.3\.0 has no such level"):
        made("10.3.0", hardware="same compute")


def test_what_parser_and_builder_refuse_is_told_and_the_log_is_kept(made, tmp_path):
    with pytest.raises(ArtefactError, match=r"parser refuses it: Det 'n1': no importer"):
        made("", stub=StubTensorRT("11.4.0.106", parses=False))
    assert "parsed" in (tmp_path / "a.engine.log").read_text()
    assert not (tmp_path / "a.engine").exists()
    with pytest.raises(ArtefactError, match=r"could not build it: no reason told"):
        made("", stub=StubTensorRT("11.4.0.106", plan=None))


def test_bad_options(made):
    for wrong in ((2, 1, 8), (0, 1, 8), (1, 9, 8)):
        with pytest.raises(ArtefactError, match=r"profile \[.*\]: expected 1 <= smallest"):
            made("10.3.0", profile=wrong)
    with pytest.raises(UsageError, match=r"hardware='any': expected one of"):
        made("10.3.0", hardware="any")


def test_an_export_lists_its_engines_and_what_was_whole_when_one_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(trt_engine, "_device", lambda: ORIN)
    checkpoint, out = str(tmp_path / "s.safetensors"), tmp_path / "out"
    make_student(Path(checkpoint), tasks=("depth",))

    def export(stub, **options):
        monkeypatch.setattr(trt_engine, "import_tensorrt", lambda: stub)
        return export_student(checkpoint=checkpoint, out=str(out), tensorrt=options)

    def listed():
        return set(json.loads((out / "export.json").read_text())["artefacts"])

    good, bad = StubTensorRT("10.3.0"), StubTensorRT("10.3.0", parses=False)
    for wrong, said in (
        ({"workspace": 5}, r"unknown \['workspace'\], expected some of \['profile'"),
        ({"profile": [1, 2]}, r"profile=\[1, 2\]: expected three numbers of images"),
        ({"profile": 4}, r"profile=4: expected three numbers of images"),
        ({"workspace_mib": 0}, "workspace_mib=0: expected a whole number, at least 1"),
        ({"workspace_mib": "big"}, "workspace_mib='big': expected a whole number"),
        ({"version_compatible": "no"}, "version_compatible='no': expected true or false"),
    ):
        with pytest.raises(UsageError, match=said):
            export(good, **wrong)
    assert not out.exists()  # said before hours of searching islands
    with pytest.raises(ArtefactError, match="parser refuses it"):
        export(bad)
    assert listed() == {"student.onnx"}
    told = export(good, profile=[1, 1, 2])  # and the folder is an earlier export's
    assert listed() == {"student.onnx", "student.engine"} == set(told["artefacts"])
    assert told["artefacts"]["student.engine"]["sha256"] == hashlib.sha256(b"plan").hexdigest()


def test_an_export_without_tensorrt_says_so_before_it_starts(tmp_path, monkeypatch):
    make_student(tmp_path / "s.safetensors", tasks=("depth",))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "out"
    with pytest.raises(EnvironmentFailure, match="TensorRT cannot be imported"):
        export_student(checkpoint=str(tmp_path / "s.safetensors"), out=str(out), tensorrt={})
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(EnvironmentFailure, match=r"TensorRT 8\.6\.1: expected 10\.0 or newer"):
        export_student(checkpoint=str(tmp_path / "s.safetensors"), out=str(out), tensorrt={})
    assert not out.exists()


# -- the known-bad table -----------------------------------------------------------------------


def attention(*, norm=True, top_k=False):
    """softmax(x x^T) x, with or without the norm of a vision transformer."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("Cast", ["p"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["c", "x"], ["y"]),
    ]
    if norm:
        nodes.append(helper.make_node("LayerNormalization", ["y", "g"], ["n"]))
    if top_k:
        nodes.append(helper.make_node("TopK", ["y", "k"], ["v", "i"]))
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 4]) for n in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "a", info[:1], info[1:]))


def hits(model, version, precision="fp32", batch=1):
    found = consult(model, version=version, precision=precision, largest_batch=batch)
    return [k.link.rsplit("/", 1)[1] for k in found]


def test_known_bad_releases_by_pattern_precision_and_batch():
    vit, bare, detr = attention(), attention(norm=False), attention(norm=False, top_k=True)
    assert hits(vit, "10.4.0.26") == ["4742"] and hits(bare, "10.4.0.26") == []
    assert hits(vit, "10.3.0.30", "fp16") == ["4723"] and hits(vit, "10.3.0.30") == []
    assert hits(bare, "10.7.0") == ["4333"]
    assert hits(vit, "10.11.0", batch=1) == [] and hits(vit, "10.11.0", batch=2) == ["4853"]
    assert hits(detr, "11.1.0") == ["4813"] and hits(vit, "11.4.0") == []


def test_a_convolutional_graph_is_in_no_report(tmp_path):
    model = hand_made(tmp_path / "a.onnx")
    model.graph.node.append(helper.make_node("TopK", ["depth", "k"], ["best", "where"]))
    assert not has_attention(model)
    for known in TABLE:
        for major, minor in known.releases:
            for precision in known.precisions:
                assert hits(model, f"{major}.{minor}.0", precision, 16) == []
        assert known.link.startswith("https://github.com/") and known.what


def test_a_softmax_without_a_product_is_no_attention():
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["m"]),  # before it, not behind it
        helper.make_node("Softmax", ["m"], ["s"]),
        helper.make_node("ReduceSum", ["s"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    assert not has_attention(helper.make_model(helper.make_graph(nodes, "s", info[:1], info[1:])))


def test_a_known_bad_build_is_refused_with_the_link_or_recorded(made, tmp_path, monkeypatch):
    monkeypatch.setattr(trt_engine, "consult", lambda *a, **k: [TABLE[1]])
    with pytest.raises(UsageError, match=r"known to be wrong .* in fp16: .*issues/4723"):
        made("10.3.0")
    sidecar, _ = made("10.3.0", allow_known_bad=True)
    assert sidecar.known_bad == [TABLE[1].link]


# -- before anything is deserialised -----------------------------------------------------------


def test_only_engines_whose_hash_we_wrote_are_loaded(made, tmp_path):
    sidecar, _ = made("10.3.0")
    engine = tmp_path / "a.engine"
    assert checked_bytes(engine, sidecar.engine) == b"plan"
    engine.write_bytes(b"plam")
    with pytest.raises(ArtefactError, match=r"changed after it was built and is not loaded"):
        checked_bytes(engine, sidecar.engine)
    engine.write_bytes(b"pla")
    with pytest.raises(ArtefactError, match=r"3 bytes, its sidecar says 4"):
        checked_bytes(engine, sidecar.engine)
    engine.unlink()
    (tmp_path / "real").write_bytes(b"plan")
    engine.symlink_to(tmp_path / "real")
    with pytest.raises(ArtefactError, match=r"links are not followed"):
        checked_bytes(engine, sidecar.engine)
    path_of(engine).unlink()
    with pytest.raises(ArtefactError, match=r"found no a\.engine\.json beside it. Only engines"):
        open_runtime(engine)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"format": "x"}', "nonsense", '{"format": null}', "[" * 200_000]
)
def test_damaged_sidecars_are_refused(tmp_path, text):
    (tmp_path / "a.engine").write_bytes(b"plan")
    (tmp_path / "a.engine.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"not a sidecar of `distill export`"):
        read_sidecar(tmp_path / "a.engine")


def test_what_claims_too_much_is_not_built(made, monkeypatch):
    monkeypatch.setattr("export.onnx_files.MAX_ELEMENTS", 1)
    with pytest.raises(ArtefactError, match="claims shape"):
        made("10.3.0")


def test_a_newer_sidecar_and_one_of_another_format_are_refused(made, tmp_path):
    made("10.3.0")
    told = json.loads((tmp_path / "a.engine.json").read_text())
    (tmp_path / "a.engine.json").write_text(json.dumps(told | {"version": 2}))
    with pytest.raises(ArtefactError, match="version 2; this program reads up to 1"):
        read_sidecar(tmp_path / "a.engine")
    (tmp_path / "a.engine.json").write_text(json.dumps(told | {"format": "x"}))
    with pytest.raises(ArtefactError, match=r"not a sidecar of `distill export`"):
        read_sidecar(tmp_path / "a.engine")


def test_another_tensorrt_or_gpu_is_refused_with_a_sentence(made):
    plain, _ = made("10.3.0")

    def check(sidecar, version="10.3.0", gpu="Orin", compute="8.7"):
        check_machine(sidecar, version=version, gpu=gpu, compute=compute, where="a.engine")

    check(plain)
    with pytest.raises(ArtefactError, match=r"by TensorRT 10\.3\.0, here is 10\.3\.1; it was"):
        check(plain, version="10.3.1")
    with pytest.raises(ArtefactError, match=r"built for Orin \(compute 8\.7.*here is T4"):
        check(plain, gpu="T4", compute="7.5")
    for other in ({"gpu": "T4"}, {"compute": "7.5"}):
        with pytest.raises(ArtefactError, match=r"built for Orin \(compute 8\.7"):
            check(plain, **other)
    loose, _ = made("10.3.0", version_compatible=True, hardware="ampere+")
    check(loose, version="11.4.0", gpu="H100", compute="9.0")
    with pytest.raises(ArtefactError, match=r"here is 12\.0"):
        check(loose, version="12.0.1")
    with pytest.raises(ArtefactError, match=r"here is 10\.2"):
        check(loose, version="10.2.0")
    with pytest.raises(ArtefactError, match=r"compute 7\.5"):
        check(loose, compute="7.5")
    check(loose, gpu="A100", compute="8.0")
    same, _ = made("10.12.0.36", hardware="same compute")
    check(same, version="10.12.0.36", gpu="another Orin")
    with pytest.raises(ArtefactError, match=r"compatibility: same compute\), here is A100"):
        check(same, version="10.12.0.36", gpu="A100", compute="8.0")


def test_acceptance_is_written_beside_the_engine(made, tmp_path):
    made("10.3.0")
    record_acceptance(tmp_path / "a.engine", {"accepted": False, "images": 3})
    assert read_sidecar(tmp_path / "a.engine").acceptance == {"accepted": False, "images": 3}
    assert (tmp_path / "a.engine").read_bytes() == b"plan"


def test_without_tensorrt_or_gpu_the_sentence_says_so(tmp_path, made, monkeypatch):
    made("10.3.0")
    monkeypatch.undo()
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with (
            pytest.raises(EnvironmentFailure, match=r"TensorRT cannot be imported"),
            open_runtime(tmp_path / "a.engine"),
        ):
            pass
    else:
        pytest.skip("TensorRT is installed here")


def test_without_a_gpu_cuda_says_so():
    try:
        Cuda().close()
    except EnvironmentFailure as error:
        assert str(error).startswith("CUDA: ")
        return
    pytest.skip("a GPU is here")


def test_the_card_travels_from_the_graph_into_the_sidecar(made, tmp_path):
    sidecar, _ = made("11.4.0.106")
    card = sidecar.card_of()
    assert (card.height, card.width, card.precision) == (16, 24, "fp16")
    model = onnx.load(tmp_path / "a.onnx")
    assert sidecar.card == {p.key: p.value for p in model.metadata_props}
    assert np.isclose(card.focal_px, 100)
