"""The names that TensorRT's Python bindings really have, from the wheels; no GPU, no TensorRT.

    pip download --no-deps tensorrt-cu12-bindings==10.3.0 tensorrt-cu12-bindings==10.12.0.36 \
        tensorrt-cu13-bindings==11.4.0.106
    python tests/benchmarks/trt_symbols.py tests/data/trt_symbols.json WHEEL [WHEEL ...]

The bindings' module needs libnvinfer only for a dozen functions that are called later, so that
empty libraries of those names (written here, compiled with gcc) let it be imported and its classes
be listed: {version: {class: [names]}}, and under "" the names of the module. Private names and
what every object has are left out.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FUNCTIONS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry "
    "getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
).split()
LISTER = """
import json, sys
import tensorrt
always = set(dir(object)) | set(dir(type))
def names(thing):
    return sorted(n for n in dir(thing) if not n.startswith("_") and n not in always)
table = {n: names(getattr(tensorrt, n)) for n in names(tensorrt)
         if isinstance(getattr(tensorrt, n), type)}
table[""] = names(tensorrt)
print(json.dumps(table))
"""


def symbols(wheel: Path, folder: Path) -> dict[str, list[str]]:
    """Class -> names of one wheel."""
    major = wheel.name.split("-")[1].split(".")[0]
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = f"lib{name}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library]
        subprocess.run([*command, source], check=True)
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith("/tensorrt.so"))
        (folder / "tensorrt.so").write_bytes(archive.read(member))
    told = subprocess.run(
        [sys.executable, "-c", LISTER],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(told.stdout)


def main():
    table = {}
    for wheel in map(Path, sys.argv[2:]):
        with tempfile.TemporaryDirectory() as folder:
            table[wheel.name.split("-")[1]] = symbols(wheel, Path(folder))
    lines = []
    for version, classes in table.items():
        rows = [f"  {json.dumps(n)}: {json.dumps(' '.join(v))}" for n, v in sorted(classes.items())]
        lines.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
