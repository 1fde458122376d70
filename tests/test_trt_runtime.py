"""What is ours around a running engine, with a stub that computes what its ONNX file says."""

import ctypes
import inspect
import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from export_cases import hand_made, make_labels
from onnx import TensorProto
from test_verify_foreign import describe, foreign_model
from trt_stub import VERSIONS, FakeCuda, StubTensorRT

from export import cuda, trt_engine, trt_runtime
from export.answers import batch_sizes
from export.artefact import ArtefactError
from export.bench_probe import Entrant, operators, picture
from export.runtimes import open_runtime
from export.trt_engine import build
from export.trt_sidecar import read_sidecar
from export.verify import verify
from teacher.errors import UsageError
from teacher.store import hash_file


@pytest.fixture
def device(monkeypatch):
    """``device(path, ...)``: a TensorRT whose plans are that ONNX file, on a fake GPU."""

    def use(path, version=VERSIONS[-1], **options):
        stub = StubTensorRT(version, plan=path.read_bytes(), **options)
        monkeypatch.setattr(trt_engine, "import_tensorrt", lambda: stub)
        monkeypatch.setattr(trt_runtime, "Cuda", FakeCuda)
        return stub

    return use


def built(folder, device, *, batch=None, profile=(1, 1, 4), **options):
    """(the ONNX file, the engine that a stub built of it)."""
    file = folder / "a.onnx"
    hand_made(file, batch=batch)
    device(file, profile=profile, **options)
    build(file, folder / "a.engine", profile=profile, device=FakeCuda().device())
    return file, folder / "a.engine"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("profile", [(1, 1, 4), (2, 2, 3)])
def test_batches_in_and_outside_the_profile_answer_like_the_graph(
    tmp_path, device, version, profile
):
    file, engine = built(tmp_path, device, profile=profile, version=version)
    images = picture((16, 24), 7)
    focal_px = np.linspace(50, 150, 7, dtype=np.float32)
    with open_runtime(file, threads=1) as graph, open_runtime(engine) as runtime:
        assert runtime.largest == profile[2] and runtime.facts["version"] == version
        for n in (1, 2, 3, 4, 7):  # filled up below the profile, split above it
            found = runtime(images[:n], focal_px[:n])["depth"]
            expected = graph(images[:n], focal_px[:n])["depth"]
            np.testing.assert_array_equal(found, expected)


def test_answers_are_read_only_when_the_stream_is_done(tmp_path, device, monkeypatch):
    class Later(FakeCuda):
        """Copies to the host when it is waited for, as late as a real stream may."""

        def to_host(self, array, address):
            self.pending = [*getattr(self, "pending", []), (array, address)]

        def wait(self):
            for array, address in self.pending:
                super().to_host(array, address)
            self.pending = []

    file, engine = built(tmp_path, device)
    monkeypatch.setattr(trt_runtime, "Cuda", Later)
    images = picture((16, 24), 6)
    with open_runtime(file, threads=1) as graph, open_runtime(engine) as runtime:
        np.testing.assert_array_equal(runtime(images)["depth"], graph(images)["depth"])


def test_an_engine_is_judged_at_every_batch_of_its_profile(tmp_path, device):
    labels = make_labels(tmp_path / "labels", n=3, tasks=("depth",))
    file, engine = built(tmp_path, device)
    given = {"labels": str(labels.path), "out": str(tmp_path / "out"), "batch": 2}
    good = verify(export=str(engine), reference=str(file), **given)
    assert {f["check"] for f in good["findings"]} == {"integrity"}  # there is no export.json
    assert not read_sidecar(engine).acceptance["accepted"]

    def wrong_for_three(name, array):
        return array * (1.1 if len(array) == 3 else 1.0)

    device(file, profile=(1, 1, 4), spoil=wrong_for_three)
    bad = verify(export=str(engine), reference=str(file), **given)
    told = [f["text"] for f in bad["findings"] if f["check"] == "consistency"]
    assert len(told) == 1 and "depth other_batch is 0.1 relative" in told[0]


def fourth_row_wrong(name, array):
    array[3:4] *= 1.1
    return array


def test_a_batch_of_one_still_asks_for_permuted_and_identical_rows(tmp_path, device):
    """Judged image by image, an engine for up to eight must agree with itself at eight."""
    labels = make_labels(tmp_path / "labels", n=2, tasks=("depth",))
    _, engine = built(tmp_path, device, profile=(1, 1, 8), spoil=fourth_row_wrong)
    given = {"labels": str(labels.path), "out": str(tmp_path / "out"), "batch": 1}
    bad = verify(export=str(engine), **given)
    told = {f["measure"] for f in bad["findings"] if f["check"] == "consistency"}
    assert told == {"depth permuted", "depth identical_rows"}  # of one row, neither could be seen


@pytest.mark.parametrize("most, asked", [(5, [1, 2, 3, 4, 5]), (64, list(range(1, 65)))])
def test_every_batch_size_of_a_profile_is_asked(most, asked):
    runtime = SimpleNamespace(largest=most, card=SimpleNamespace(batch=None))
    assert batch_sizes(runtime, 4) == asked
    huge = batch_sizes(SimpleNamespace(largest=200, card=runtime.card), 4)
    assert {1, 2, 3, 4, 5, 8, 16, 192, 200} <= set(huge) and max(huge) == 200


def test_time_by_layer_is_what_tensorrt_reports(tmp_path, device):
    _, engine = built(tmp_path, device)
    rows = operators(Entrant(path=engine, provider="cpu", threads=1), (16, 24), calls=4)
    assert rows == [
        {"operator": "conv + relu", "ms": 2.0, "share": pytest.approx(2 / 3)},
        {"operator": "softmax", "ms": 1.0, "share": pytest.approx(1 / 3)},
    ]


# -- engines that we did not make --------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, device):
    """``foreign(...)``: (an engine with no sidecar, its description); both in tmp_path."""

    def make(*, vouched=True, change=None, **options):
        file = foreign_model(tmp_path / "m.onnx")
        model = onnx.load(file)
        if change is not None:
            change(model)
            onnx.save(model, file)
        engine = tmp_path / "m.engine"
        engine.write_bytes(file.read_bytes())
        device(file, **options)
        promised = {"sha256": hash_file(engine)} if vouched else {}
        return engine, describe(tmp_path / "io.yaml", **promised)

    return make


def test_any_described_engine_is_judged(tmp_path, foreign):
    labels = make_labels(tmp_path / "labels", n=3, tasks=("depth",))
    engine, io = foreign(profile=(2, 3, 4))
    given = {"labels": str(labels.path), "io": str(io), "out": str(tmp_path / "out")}
    result = verify(export=str(engine), **given)
    assert result["exit"] == 0, result["summary"]
    with (
        open_runtime(engine, io=io) as runtime,
        open_runtime(tmp_path / "m.onnx", io=describe(tmp_path / "b.yaml")) as graph,
    ):
        assert runtime.facts["profile"] == [2, 4] and runtime.largest == 4  # the engine's own
        images = picture((16, 24), 5)
        np.testing.assert_array_equal(runtime(images)["depth"], graph(images)["depth"])
    held = verify(export=str(engine), reference=str(engine.with_suffix(".onnx")), **given)
    assert held["exit"] == 0 and "m.engine" in held["summary"], held["summary"]
    model = onnx.load(engine.with_suffix(".onnx"))
    model.producer_name = "another"
    onnx.save(model, engine.with_suffix(".onnx"))
    with pytest.raises(UsageError, match=r"not the file that .* describes"):
        verify(export=str(engine), reference=str(engine.with_suffix(".onnx")), **given)
    two = [hash_file(engine), hash_file(engine.with_suffix(".onnx"))]
    for hashes in (two, two[::-1]):
        given["io"] = str(describe(tmp_path / "io.yaml", sha256=hashes))
        held = verify(export=str(engine), reference=str(engine.with_suffix(".onnx")), **given)
        assert held["exit"] == 0, held["summary"]


def test_a_described_engine_is_loaded_only_if_its_bytes_are_vouched_for(foreign):
    engine, io = foreign(vouched=False)
    with pytest.raises(ArtefactError, match=r"io\.yaml names no sha256. An engine is executable"):
        open_runtime(engine, io=io)
    engine, io = foreign()
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    with (
        pytest.raises(ArtefactError, match=r"its description says .* is not loaded"),
        open_runtime(engine, io=io),
    ):
        pass


def double(model):
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def renamed(model):
    for node in model.graph.node:
        node.output[:] = ["other" if o == "d" else o for o in node.output]
    model.graph.output[0].name = "other"


def huge(model):
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 1 << 30


def huge_in_batches(model):  # 24 << 25 elements each: only eight of them are too many
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 1 << 25


def of_any_height(model):
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "H"


@pytest.mark.parametrize(
    "change, said",
    [
        (double, "d is DOUBLE, expected one of"),
        (renamed, r"outputs \['other'\], .*describes \['pixels'\] and \['d'\]"),
        (huge, "d has shape .* it is not run"),
        (huge_in_batches, "d has shape .* it is not run"),
        (of_any_height, r"d has shape \[8, 1, -1, 24\]; it is not run"),
    ],
)
def test_an_engine_that_is_not_as_described_is_refused(foreign, change, said):
    engine, io = foreign(change=change)
    with pytest.raises(ArtefactError, match=said), open_runtime(engine, io=io):
        pass


def test_a_plan_that_tensorrt_cannot_load_is_refused(tmp_path, foreign):
    engine, _ = foreign()
    engine.write_bytes(b"no plan")
    io = describe(tmp_path / "io.yaml", sha256=hash_file(engine))
    with (
        pytest.raises(ArtefactError, match="TensorRT does not load it"),
        open_runtime(engine, io=io),
    ):
        pass


# -- the CUDA calls ----------------------------------------------------------------------------


def test_every_cuda_name_exists_in_the_real_library():
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = sorted(packages.glob("**/libcudart.so.1?"))
    if not found:
        pytest.skip("no CUDA runtime is installed (a torch for CPUs)")
    library = ctypes.CDLL(str(found[0]))
    used = set(re.findall(r"\bcuda(?!DevAttr)[A-Z]\w+", inspect.getsource(cuda)))
    assert {"cudaMalloc", "cudaMemGetInfo", "cudaMemcpyAsync"} <= used and len(used) > 8
    # the name with _v2 is CUDA 12's, the other one's is 11's and 13's
    wanted = used - {"cudaGetDeviceProperties_v2", "cudaGetDeviceProperties"}
    assert [n for n in sorted(wanted) if not hasattr(library, n)] == []
    assert hasattr(library, "cudaGetDeviceProperties") or hasattr(
        library, "cudaGetDeviceProperties_v2"
    )
