"""An ONNX artefact to a TensorRT engine: one code path for 10.x and 11.x, strongly typed.

Precision is in the graph, so there is no precision flag to set: releases from 11 on have none, and
10.x takes the same ``STRONGLY_TYPED`` network. TF32 is switched off: fp32 means fp32. Written
per engine: the plan itself, clean; ``NAME.engine.json`` (`export.trt_sidecar`);
``NAME.engine.log``, all that the builder said. The timing cache is keyed by device, version and
flags.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.artefact import ArtefactError, card_from_metadata
from export.onnx_files import check_external_data, check_sizes, read_model
from export.readiness import verdicts
from export.trt_known_bad import consult
from export.trt_sidecar import Profile, Sidecar, facts_of, release_of
from teacher.errors import EnvironmentFailure, UsageError
from teacher.jobs.commit import replace_atomically

HARDWARE = {"none": "NONE", "same compute": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
OPTIONS = ("profile", "workspace_mib", "version_compatible", "hardware", "allow_known_bad")
OLDEST = (10, 0)
MIB = 1 << 20


def import_tensorrt() -> Any:
    """The module, or an `EnvironmentFailure` that says how to get it."""
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise EnvironmentFailure(
            f"TensorRT cannot be imported ({error}). Install it where the engine will run "
            '(pip install "dense-distill[tensorrt]"; on Jetson it comes with JetPack).'
        ) from error
    if release_of(trt.__version__) < OLDEST:
        raise EnvironmentFailure(
            f"TensorRT {trt.__version__}: expected 10.0 or newer (strongly typed networks)."
        )
    return trt


def check_options(options: Mapping[str, Any]) -> Profile:
    """The profile of `build`'s ``options``; `UsageError` or `ArtefactError` for wrong ones."""
    if strange := sorted(set(options) - set(OPTIONS)):
        raise UsageError(f"tensorrt: unknown {strange}, expected some of {list(OPTIONS)}.")
    sizes, hardware = options.get("profile", (1, 1, 8)), options.get("hardware", "none")
    workspace_mib = options.get("workspace_mib", 1)
    if not isinstance(sizes, Sequence) or [type(n) for n in sizes] != [int] * 3:
        raise UsageError(f"profile={sizes}: expected three numbers of images, as in [1, 1, 8].")
    if not isinstance(hardware, str) or hardware not in HARDWARE:
        raise UsageError(f"hardware={hardware!r}: expected one of {list(HARDWARE)}.")
    if type(workspace_mib) is not int or workspace_mib < 1:
        raise UsageError(f"workspace_mib={workspace_mib!r}: expected a whole number, at least 1.")
    for name in ("version_compatible", "allow_known_bad"):
        if not isinstance(options.get(name, False), bool):
            raise UsageError(f"{name}={options[name]!r}: expected true or false.")
    return Profile(smallest=sizes[0], best=sizes[1], largest=sizes[2])


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps every line: ``.lines``."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(f"{getattr(severity, 'name', severity)}: {message}")

    return Log()


def build(
    onnx_path: Path,
    engine: Path,
    *,
    profile: Sequence[int] = (1, 1, 8),
    workspace_mib: int = 2048,
    version_compatible: bool = False,
    hardware: str = "none",
    allow_known_bad: bool = False,
    cache_folder: Path | None = None,
    device: tuple[str, str] | None = None,
) -> Sidecar:
    """Build one engine and its sidecar.

    Args:
        onnx_path: an artefact of `distill export`.
        engine: where the plan goes, ``*.engine``.
        profile: smallest, best and largest batch; all the same for a graph of fixed N.
        workspace_mib: the most scratch memory a kernel may take [MiB].
        version_compatible: whether later TensorRT releases may load it (slower, carries code).
        hardware: ``none`` (this GPU only), ``same compute``, ``ampere+``.
        allow_known_bad: build although the release is known to be wrong for such a graph.
        cache_folder: of timing caches; None: beside the engine.
        device: (GPU's name, compute capability); None: asked from CUDA.

    Raises:
        ArtefactError: not ours, the parser or the builder refuses it. UsageError: known bad,
            options this release lacks. EnvironmentFailure: no TensorRT, no GPU.
    """
    asked = {"profile": profile, "hardware": hardware, "workspace_mib": workspace_mib}
    shapes = check_options(asked)
    if engine.suffix != ".engine":
        raise UsageError(f"engine={engine}: expected NAME.engine.")
    model = read_model(onnx_path)
    check_sizes(model, where=str(onnx_path))
    metadata = {p.key: p.value for p in model.metadata_props}
    card = card_from_metadata(metadata, where=str(onnx_path))
    if card.batch is not None:
        shapes = Profile(smallest=card.batch, best=card.batch, largest=card.batch)
    trt = import_tensorrt()
    known = consult(
        model, version=trt.__version__, precision=card.precision, largest_batch=shapes.largest
    )
    if known and not allow_known_bad:
        told = "; ".join(f"{k.what} ({k.link})" for k in known)
        raise UsageError(
            f"{onnx_path.name}: TensorRT {trt.__version__} is known to be wrong for such a graph "
            f"in {card.precision}: {told}. Use another release, or allow_known_bad=true and let "
            "distill verify judge what comes out."
        )
    _refuse_unready(model, onnx_path, trt.__version__)
    gpu, compute = device if device is not None else _device()
    options = {
        "workspace_mib": workspace_mib,
        "version_compatible": version_compatible,
        "hardware": hardware,
        "tf32": False,
    }
    cache = cache_path(
        cache_folder or engine.parent, version=trt.__version__, gpu=gpu, options=options
    )
    logger = make_logger(trt)
    try:
        plan, timing = _compile(
            trt, logger, onnx_path, card.focal_input, shapes, options, _read(cache)
        )
    finally:
        log = "\n".join(logger.lines) + "\n"
        replace_atomically(engine.with_name(engine.name + ".log"), log.encode())
    replace_atomically(cache, timing)
    replace_atomically(engine, plan)
    sidecar = Sidecar(
        engine=facts_of(engine),
        onnx=facts_of(onnx_path) | {"external": check_external_data(model, onnx_path)},
        tensorrt=trt.__version__,
        gpu=gpu,
        compute=compute,
        profile=shapes,
        precision=card.precision,
        version_compatible=version_compatible,
        hardware=hardware,
        card=metadata,
        options=options,
        known_bad=[k.link for k in known],
    )
    sidecar.write(engine)
    return sidecar


def _device() -> tuple[str, str]:
    from export.cuda import Cuda

    cuda = Cuda()
    try:
        return cuda.device()
    finally:
        cuda.close()


def _refuse_unready(model: Any, path: Path, version: str) -> None:
    """Refuse at once what the parser's published table rules out for this release."""
    major, minor = release_of(version)
    target = "11" if major >= 11 else "10.12" if minor >= 12 else "10.3"
    told = verdicts(model)[target]
    if told["takes"] == "no":
        raise ArtefactError(
            f"{path}: TensorRT {version} does not take this graph: {'; '.join(told['why'])} "
            "(export.readiness)."
        )


def cache_path(folder: Path, *, version: str, gpu: str, options: Mapping[str, Any]) -> Path:
    """Where the timing cache of this device, version and flags lies."""
    key = json.dumps([version, gpu, dict(sorted(options.items()))])
    return folder / f".timing-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cache"


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _compile(
    trt: Any,
    logger: Any,
    onnx_path: Path,
    focal_input: bool,
    shapes: Profile,
    options: Mapping[str, Any],
    timing: bytes,
) -> tuple[bytes, bytes]:
    """(plan, timing cache); names here are checked against the real bindings by a test."""
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in errors[:3])
        raise ArtefactError(f"{onnx_path}: TensorRT's parser refuses it: {told}.")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mib"] * MIB)
    config.clear_flag(trt.BuilderFlag.TF32)
    if options["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = _level(trt, options["hardware"])
    cache = config.create_timing_cache(timing)
    config.set_timing_cache(cache, ignore_mismatch=False)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = tuple(tensor.shape)[1:]
        sizes = [(n, *rest) for n in (shapes.smallest, shapes.best, shapes.largest)]
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        errors = [line for line in logger.lines if "ERROR" in line.partition(":")[0]]
        told = "; ".join(errors[-3:]) or "no reason told"
        raise ArtefactError(f"{onnx_path}: TensorRT could not build it: {told}")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def _level(trt: Any, hardware: str) -> Any:
    """The hardware compatibility of this release; `UsageError` if it has no such level."""
    level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[hardware], None)
    if level is None:
        raise UsageError(f"hardware={hardware!r}: TensorRT {trt.__version__} has no such level.")
    return level
