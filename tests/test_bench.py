"""`distill bench`: what it measures, what it says, and what it refuses to compare."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from export_cases import hand_made, make_student

from export.bench_probe import Entrant, operators, picture, probe
from export.bench_report import points, short
from export.benchmark import (
    accuracy,
    bench,
    find_entrants,
    measure,
    race,
    ratios,
    refuse_all_too_large,
)
from export.conditions import conditions, others_running, same_conditions
from export.runtimes import open_runtime
from teacher.errors import EnvironmentFailure, UsageError
from teacher.store import hash_file


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    hand_made(folder / "a.onnx")
    hand_made(folder / "b.onnx", batch=2)
    return folder, bench(export=str(folder), threads=1, batches=[1, 2], rounds=3)


def test_every_number_is_there_and_makes_sense(measured):
    folder, result = measured
    report = json.loads((folder / "bench" / "bench.json").read_text())
    assert set(report["artefacts"]) == {"a.onnx", "b.onnx"} == set(result["artefacts"])
    row = report["artefacts"]["a.onnx"]
    assert set(row["batches"]) == {"1", "2"} and row["precision"] == "fp32"
    for n, times in row["batches"].items():
        assert 0 < times["best_ms"] <= times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
        assert times["images_per_s"] == pytest.approx(int(n) * 1e3 / times["p50_ms"], rel=1e-6)
    assert row["first_call_ms"] > 0 and row["open_ms"] > 0 and row["memory_kib"] > 100
    assert row["batches"]["1"]["cpu_p50_ms"] > 0
    assert row["bytes"] == (folder / "a.onnx").stat().st_size
    assert row["sha256"] == hash_file(folder / "a.onnx")
    assert row["runtime"]["providers"] == ["CPUExecutionProvider"]
    assert (folder / "bench" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    text = (folder / "bench" / "bench.md").read_text()
    assert f"{row['batches']['1']['p50_ms']:.2f}" in text and "threads 1" in text


def test_time_by_operator_adds_up(measured):
    folder, result = measured
    rows = operators(entrant(folder / "a.onnx"), (16, 24))
    call_ms = result["artefacts"]["a.onnx"]["batches"]["1"]["p50_ms"]
    assert call_ms / 100 < sum(r["ms"] for r in rows) < call_ms * 10
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert {r["operator"] for r in rows} <= {"Cast", "ReduceMean", "Mul", "Add", "Unsqueeze"}
    assert [r["ms"] for r in rows] == sorted((r["ms"] for r in rows), reverse=True)


def entrant(path, **options):
    return Entrant(path=path, **{"provider": "cpu", "threads": 1} | options)


def test_artefacts_take_turns(measured):
    """Each round calls every artefact once: the order of calls, as they see it."""
    folder, _ = measured
    called = []
    with open_runtime(folder / "a.onnx", threads=1) as one:

        class Watched:
            largest, card = None, one.card

            def __init__(self, name):
                self.name = name

            def __call__(self, images):
                called.append(self.name)
                return one(images)

        measure({n: Watched(n) for n in "xyz"}, (16, 24), 1, rounds=4)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert all(sorted(r) == ["x", "y", "z"] for r in rounds) and len(rounds) == 4 + 3
    assert len({tuple(r) for r in rounds}) > 1  # and not always in the same order


def test_warm_rounds_are_not_counted_and_waiting_is_no_cpu_time(measured):
    with open_runtime(measured[0] / "a.onnx", threads=1) as one:

        class Slow:
            largest, card, calls = None, one.card, 0

            def __call__(self, images):
                self.calls += 1
                time.sleep(0.6 if self.calls <= 3 else 0.05)
                return one(images)

        told = measure({"x": Slow()}, (16, 24), 1, rounds=2)["x"]
    assert 50 <= told["p50_ms"] <= told["p99_ms"] < 600
    assert told["cpu_p50_ms"] < 25


def test_numbers_of_other_conditions_are_not_compared(measured, monkeypatch):
    folder, _ = measured
    monkeypatch.setattr("export.benchmark.others_running", lambda: -1.0)
    bench(export=str(folder), threads=1, batches=[1], rounds=3)
    earlier = folder / "bench" / "bench.json"
    same = bench(
        export=str(folder / "a.onnx"),
        out=str(folder / "again"),
        threads=1,
        batches=[1],
        rounds=3,
        against=str(earlier),
    )
    assert (
        "p50 as a multiple of the earlier run's: batch 1:"
        in (folder / "again" / "bench.md").read_text()
    )
    assert set(same["artefacts"]) == {"a.onnx"}
    with pytest.raises(UsageError, match=r"other conditions \(rounds: 3 then, 4 now\)"):
        bench(export=str(folder), threads=1, batches=[1], rounds=4, against=str(earlier))
    now = conditions(provider="cpu", threads=1, rounds=3, size=(16, 24), others=0.0)
    assert now["torch"] and now["onnxruntime"] and now["tensorrt"] is None
    facts = {"cpu", "cores", "gpu", "system", "python", "numpy", "provider", "threads", "size"}
    assert facts <= set(now)
    for others, busy in ((now["cores"] - 1, False), (now["cores"] - 0.5, True)):  # one is ours
        given = {"provider": "cpu", "threads": 1, "rounds": 3, "size": (16, 24)}
        assert conditions(**given, others=others)["busy"] == busy
    older = {k: v for k, v in now.items() if k != "numpy"}
    with pytest.raises(UsageError, match="numpy: None then"):
        same_conditions(older, now, "x")
    then = {"artefacts": {"a": {"batches": {"1": {"p50_ms": 2.0}}}}}
    table = {"a": {"batches": {"1": {"p50_ms": 3.0}, "4": {"p50_ms": 9.0}}}}
    assert ratios(then, table | {"new": table["a"]}) == {"a": {"1": 1.5}}
    with pytest.raises(UsageError, match=r"torch: '1\.0' then"):
        same_conditions(now | {"torch": "1.0"}, now, "x")
    with pytest.raises(UsageError, match="cpu: 'an abacus' then"):
        same_conditions(now | {"cpu": "an abacus"}, now, "x")
    monkeypatch.setattr("export.benchmark.others_running", lambda: 99.0)
    given = {"export": str(folder), "threads": 1, "batches": [1], "rounds": 3}
    with pytest.raises(UsageError, match="busy: False then, True now"):
        bench(**given, against=str(earlier))
    bench(**given, out=str(folder / "busy"))
    assert "99 other threads were running on" in (folder / "busy" / "bench.md").read_text()
    (folder / "other.json").write_text('{"format": "x", "conditions": {}, "artefacts": {}}')
    with pytest.raises(UsageError, match=r"no bench\.json of `distill bench`"):
        bench(export=str(folder), against=str(folder / "other.json"))


def test_accuracy_is_taken_from_the_verdict_on_this_very_file(measured, tmp_path):
    folder, _ = measured
    (tmp_path / "verify").mkdir()
    (tmp_path / "a.onnx").write_bytes((folder / "a.onnx").read_bytes())
    mean = {"depth": {"delta1": 0.5}, "normals": {"mean_deg": 20.0}}
    truth = {"mean": mean, "set": {"semantic": {"miou": 0.3}}, "images": 7}
    report = {
        "scores": {"a.onnx": {"teacher": truth | {"images": 9}, "truth": truth}},
        "runs": {"a.onnx": {"sha256": hash_file(tmp_path / "a.onnx")}},
    }
    (tmp_path / "verify" / "report.json").write_text(json.dumps(report))
    found = find_entrants([tmp_path], provider="cpu", threads=1)
    expected = {"depth.delta1": 0.5, "normals.mean_deg": 20.0, "semantic.miou": 0.3}
    assert accuracy(found) == {"a.onnx": {"against": "truth", "images": 7} | expected}
    half = {"a.onnx": entrant(tmp_path / "a.onnx", precision="fp16")}
    assert accuracy(half) == {}  # nobody judged that
    for wrong in ("x", None, [1], {}):
        report["scores"]["a.onnx"]["truth"]["mean"] = {"depth": {"delta1": wrong}}
        (tmp_path / "verify" / "report.json").write_text(json.dumps(report))
        if wrong is None:  # not finite
            assert "depth.delta1" not in accuracy(found)["a.onnx"]
            continue
        with pytest.raises(UsageError, match=r"report\.json: not a report of `distill verify`"):
            accuracy(found)
    (tmp_path / "a.onnx").write_bytes(b"another file")
    assert accuracy(found) == {}


def test_the_plot_holds_what_was_timed_and_judged():
    rows = {"batches": {"1": {"p50_ms": 3.0}, "4": {"p50_ms": 9.0}}}
    result = {
        "artefacts": {"a": rows, "b": rows, "late": {"batches": {"4": {"p50_ms": 1.0}}}},
        "accuracy": {"a": {"depth.delta1": 0.5}, "late": {"depth.delta1": 0.6}},
    }
    assert points(result, "depth.delta1") == {"a": (3.0, 0.5)}
    assert points(result, "semantic.miou") == {}
    late = {"artefacts": {"a": {"batches": {"16": {"p50_ms": 30.0}, "4": {"p50_ms": 9.0}}}}}
    assert points(late | {"accuracy": result["accuracy"]}, "depth.delta1") == {"a": (9.0, 0.5)}
    assert [short(n) for n in ("student.onnx", "x/student.int8-cpu.onnx", "student.engine")] == [
        "fp32",
        "x/int8-cpu",
        "fp32 engine",
    ]
    assert short("student.safetensors in bf16") == "torch in bf16" and short("m.onnx") == "m"


def test_several_folders_take_turns_and_a_gpu_gets_torchs_halves(tmp_path):
    for name in ("tiny", "small"):
        (tmp_path / name).mkdir()
        hand_made(tmp_path / name / "student.onnx")
    both = [str(tmp_path / n) for n in ("tiny", "small")]
    with pytest.raises(UsageError, match="so out=FOLDER must be given"):
        bench(export=both)
    out = tmp_path / "out"
    told = bench(export=both, out=str(out), threads=1, batches=[1], rounds=1)["artefacts"]
    assert set(told) == {"tiny/student.onnx", "small/student.onnx"}
    with pytest.raises(UsageError, match=r"two of the name tiny/student\.onnx"):
        bench(export=[both[0], both[0]], out=str(out))
    (tmp_path / "tiny" / "student.safetensors").write_bytes(b"")
    found = find_entrants([tmp_path / "tiny"], provider="cpu", threads=1)
    assert set(found) == {"student.onnx", "student.safetensors"}
    found = find_entrants([tmp_path / "tiny"], provider="cuda", threads=1)
    assert {n: e.precision for n, e in found.items()} == {
        "student.onnx": "fp32",
        "student.safetensors": "fp32",
        "student.safetensors in fp16": "fp16",
        "student.safetensors in bf16": "bf16",
    }


def test_the_student_itself_is_timed_by_kernel_and_in_half_precision(tmp_path):
    path = make_student(tmp_path / "s.safetensors", tasks=("depth",), height=32, width=64)
    rows = operators(entrant(path), (32, 64), calls=1)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert any("conv" in r["operator"] for r in rows[:3])
    images = picture((32, 64), 2)
    with entrant(path).open() as whole, entrant(path, precision="bf16").open() as half:
        ratio = half(images)["depth"] / whole(images)["depth"]
    assert half.facts["autocast"] == "bf16" == half.card.precision
    assert "autocast" not in whole.facts
    assert 1e-4 < abs(ratio - 1).max() < 0.2  # rounded, and the same network


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_student_asked_for_on_a_gpu_never_runs_on_the_cpu_instead(tmp_path):
    path = make_student(tmp_path / "s.safetensors", tasks=("depth",), height=32, width=64)
    with pytest.raises(EnvironmentFailure, match="finds no GPU; ask for provider=cpu"):
        bench(export=str(path), provider="cuda", rounds=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_times_torch_in_three_precisions_and_its_memory(tmp_path):
    path = make_student(tmp_path / "s.safetensors", tasks=("depth",), height=32, width=64)
    told = bench(export=str(path), provider="cuda", threads=1, batches=[1], rounds=3)["artefacts"]
    assert {r["precision"] for r in told.values()} == {"fp32", "fp16", "bf16"}
    for row in told.values():
        assert row["gpu_memory_kib"] > 100 and row["operators"]
        assert row["runtime"]["device"] == torch.cuda.get_device_name()


def test_what_the_numbers_do_not_say_is_written_beside_them(tmp_path, monkeypatch):
    hand_made(tmp_path / "fixed.onnx", batch=2)
    hand_made(tmp_path / "half.onnx", precision="fp16")
    given = {"export": str(tmp_path), "threads": 1, "rounds": 1}
    told = bench(**given, batches=[4])["artefacts"]
    assert {n: list(row["batches"]) for n, row in told.items()} == {
        "fixed.onnx": [],
        "half.onnx": ["4"],
    }
    text = (tmp_path / "bench" / "bench.md").read_text()
    assert "fixed.onnx: batches [4] not measured, it takes 2 at most" in text
    assert "half.onnx: ONNX Runtime computes fp16 in float32 on a CPU" in text
    refuse_all_too_large({"x": SimpleNamespace(largest=2)}, [2])  # it takes that many
    monkeypatch.setattr("export.benchmark.measure", None)  # all of these come before measuring
    with pytest.raises(UsageError, match=r"batches=\[4\]: none takes 4 images at once"):
        bench(**given | {"export": str(tmp_path / "fixed.onnx")}, batches=[4])
    (tmp_path / "bench" / "thesis.doc").write_text("x")
    with pytest.raises(UsageError, match=r"found thesis\.doc"):
        bench(**given, batches=[1])
    (tmp_path / "verify").mkdir()
    for broken in ("{", "{}", "[]"):
        (tmp_path / "verify" / "report.json").write_text(broken)
        with pytest.raises(UsageError, match=r"report\.json: not a report of `distill verify`"):
            bench(**given, batches=[1], out=str(tmp_path / "other"))
    (tmp_path / "b.json").write_text('{"format": "dense-distill/bench"}')
    with pytest.raises(UsageError, match=r"no bench\.json of .*without \['artefacts', 'condit"):
        bench(**given, batches=[1], against=str(tmp_path / "b.json"))
    for row in ([], {"batches": []}, {"batches": {"1": {}}}, {"batches": {"1": {"p50_ms": 0}}}):
        text = {"format": "dense-distill/bench", "conditions": {}, "artefacts": {"half.onnx": row}}
        (tmp_path / "b.json").write_text(json.dumps(text))
        with pytest.raises(UsageError, match=r"no bench\.json of `distill bench`"):
            bench(**given, batches=[1], against=str(tmp_path / "b.json"))


def test_a_thread_that_runs_beside_us_is_seen_at_once():
    quiet = others_running(5)
    loop = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(loop) for _ in range(4)]
    try:
        time.sleep(0.3)
        assert others_running(20) >= 2 and quiet >= 0
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def test_others_running_are_those_of_now_without_us(monkeypatch):
    monkeypatch.setattr("export.benchmark.Path.read_text", lambda p: "9.5 9.5 9.5 4/300 12345\n")
    assert others_running(1) == 3


def test_race_and_probe(measured):
    folder, result = measured
    paths = {"a": folder / "a.onnx", "b": folder / "a.onnx"}
    import numpy as np

    feed = {"image": picture((16, 24), 1), "focal_px": np.array([100], np.float32)}
    times = race(paths, feed, threads=1, rounds=5)
    assert set(times) == {"a", "b"}
    best_ms = result["artefacts"]["a.onnx"]["batches"]["1"]["best_ms"]  # the session and our checks
    assert all(best_ms / 100 < t < best_ms * 100 for t in times.values())
    told = probe(entrant(folder / "a.onnx"))
    assert set(told) == {"open_ms", "first_call_ms", "memory_kib", "gpu_memory_kib"}
    assert told["gpu_memory_kib"] is None
    assert told["memory_kib"] < 50 * 1024 and told["open_ms"] > 0.2  # of onnx and ORT, nothing


def test_bad_use(tmp_path):
    with pytest.raises(UsageError, match="found no model there"):
        bench(export=str(tmp_path))
    hand_made(tmp_path / "a.onnx")
    for rounds, batches in ((0, [1]), (1, []), (1, [4, 0])):
        with pytest.raises(UsageError, match=rf"rounds={rounds} batches=.*: expected at least 1"):
            bench(export=str(tmp_path), rounds=rounds, batches=batches)
    hand_made(tmp_path / "b.onnx", size=(8, 8))
    with pytest.raises(UsageError, match="artefacts of several image sizes"):
        bench(export=str(tmp_path), rounds=1, batches=[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("x")
    with pytest.raises(UsageError, match=r"found thesis\.doc"):
        bench(export=str(tmp_path / "a.onnx"), out=str(tmp_path / "out"), rounds=1, batches=[1])
