"""How the kernels are loaded and kept: imports stay light, caches stay true or are done without."""

import subprocess
import sys


def test_importing_the_codecs_loads_neither_numba_nor_torch():
    code = (
        "import sys, teacher, teacher.codecs.depth, teacher.codecs.normals;"
        "import teacher.codecs.segmentation, teacher.codecs.curves;"
        "print(sorted({'numba', 'torch', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_cached_kernel_is_stale_when_a_neighbour_file_changes(tmp_path):
    jit = "from teacher.codecs._jit import inline, jit\n"
    (tmp_path / "_inner.py").write_text(jit + "@inline\ndef one(x):\n    return x + 1\n")
    outer = "from _inner import one\n@jit\ndef kernel(x):\n    return one(x)\n"
    (tmp_path / "_outer.py").write_text(jit + outer)

    def run():
        code = (
            "import _outer; print(_outer.kernel(1), sum(_outer.kernel.stats.cache_hits.values()))"
        )
        cwd = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
        return subprocess.run([sys.executable, "-c", code], **cwd).stdout.split()

    assert run() == ["2", "0"] and run() == ["2", "1"]
    (tmp_path / "_inner.py").write_text(jit + "@inline\ndef one(x):\n    return x + 70\n")
    assert run() == ["71", "0"]


def test_kernels_run_where_no_cache_can_be_written(tmp_path):
    import shutil
    from pathlib import Path

    import teacher

    shutil.copytree(
        Path(teacher.__file__).parent,
        tmp_path / "teacher",
        ignore=shutil.ignore_patterns("__pycache__", "weights"),
    )
    for folder in [tmp_path / "teacher", *(tmp_path / "teacher").rglob("*/")]:
        (folder / "__pycache__").write_text("in the way")  # root writes anywhere; not in a file
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "import numpy as np, teacher; from teacher.codecs.normals import NormalCodec;"
        "n, _ = NormalCodec().decode(np.array([[128, 128, 255]], np.uint8));"
        "print(teacher.__file__, n.round(2).tolist())"
    )
    nowhere = {
        "PYTHONPATH": str(tmp_path),
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": "/dev/null/x",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nowhere)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(str(tmp_path)) and "[[0.0, 0.0, 1.0]]" in out.stdout
