"""The `distill` command: one verb, Hydra overrides, one result line, honest exit codes.

    distill VERB key=value ...      run a verb         distill VERB --help   its keys
    distill VERB --multirun a=1,2   Hydra's sweeps     distill --help        all verbs

Exit codes: 0 fine; 1 judged and found wanting; 2 bad use; 3 the environment failed; 4 our bug;
130/143 interrupted, start again to resume.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from student.kinds import wrong_kind

# verb -> (module, function, what it does). The one place that names export's verbs.
VERBS: dict[str, tuple[str, str, str]] = {
    "demo": ("distill.demo", "demo", "the whole chain on synthetic scenes"),
    "scenes": ("teacher.scenes", "make_scenes", "synthetic scenes with exact truth"),
    "label": ("teacher.jobs.run", "label", "a teacher labels images"),
    "inspect": ("teacher.report", "inspect", "HTML report of a label set"),
    "check": ("teacher.jobs.check", "check", "is a label set whole, has the teacher drifted"),
    "select": ("teacher.jobs.selection", "select", "which labels are worth learning from"),
    "tune": ("distill.tune.run", "tune", "instruction-tune a generator"),
    "train": ("distill.train", "train", "train a student on label sets"),
    "export": ("export.delivery", "export_student", "student -> ONNX"),
    "calibrate": (
        "distill.fit_student",
        "calibrate",
        "when a teacher is right; a student's scale",
    ),
    "verify": ("export.verify", "verify", "judge artefacts against teacher and truth"),
    "bench": ("export.benchmark", "bench", "latency, throughput, memory, size, side by side"),
    "predict": ("export.predict", "predict", "answers on any images, with pictures"),
}
DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENODEV,
               errno.ESTALE, errno.ETIMEDOUT}  # fmt: skip
GRACE_S = 25.0  # of a label job after a signal; SLURM and Kubernetes kill after 30
EXTRAS = {"mitsuba": "scenes", "tensorrt": "tensorrt", "ray": "ray"}


class Interrupted(BaseException):
    """SIGTERM arrived; what was committed stays, the rest is redone by the same command."""

    exit_code = 143


def verb_function(verb: str) -> Callable[..., dict[str, Any]]:
    """Import a verb's function; only that verb's house is loaded."""
    module, function, _ = VERBS[verb]
    return getattr(importlib.import_module(module), function)


def configure(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The verb's YAML with overrides, as plain Python values."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    try:
        with initialize_config_module("conf", version_base="1.3"):
            config = compose(verb, overrides=list(overrides))
    except HydraException:
        raise_for_unknown_key(verb, overrides)
        raise
    return plain_values(verb, config, overrides)


def plain_values(verb: str, config: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """A composed configuration as plain Python values; names the keys that were left open."""
    from omegaconf import OmegaConf

    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    missing = sorted(str(k) for k in OmegaConf.missing_keys(config))
    missing += [k for k in required_keys(verb) if given.get(k) in ("", "null")]
    if missing:
        from teacher.errors import UsageError

        raise UsageError(
            f"{', '.join(f'{k}=' for k in missing)} must be given; "
            f"`distill {verb} --help` shows every key."
        )
    values: dict = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    for key in required_keys(verb):
        if isinstance(values[key], int | float):  # a folder named 2026
            values[key] = given[key]
    return values


def required_keys(verb: str) -> list[str]:
    """The keys that a verb's YAML leaves open; all of them name files or folders."""
    from omegaconf import OmegaConf

    return [
        str(k) for k in OmegaConf.missing_keys(OmegaConf.load(str(files("conf") / f"{verb}.yaml")))
    ]


def raise_for_unknown_key(verb: str, overrides: Sequence[str]) -> None:
    """Name a mistyped key with the one that was probably meant; other mistakes are Hydra's."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from teacher.errors import UsageError

    chosen = [o for o in overrides if (files("conf") / o.partition("=")[0]).is_dir()]
    try:
        with initialize_config_module("conf", version_base="1.3"):
            defaults = compose(verb, overrides=chosen)
    except HydraException:
        return
    for key in (o.partition("=")[0] for o in overrides if o[:1] not in "+~" and "@" not in o):
        node: Any = OmegaConf.to_container(defaults)
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if isinstance(node, dict) and part not in node:
                near = difflib.get_close_matches(part, [str(k) for k in node], 1)
                meant = ".".join([*parts[:depth], *near, *parts[depth + 1 :]])
                raise UsageError(
                    f"{key}=: there is no such key; {f'did you mean {meant}=? ' if near else ''}"
                    f"Keys here: {', '.join(sorted(map(str, node)))}."
                )
            node = node.get(part) if isinstance(node, dict) else None


def raise_for_wrong_kind(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Name a value that is not what the verb's signature says; tables are the verb's to check."""
    from teacher.errors import UsageError

    wrong = wrong_kind(function, values)
    if wrong is not None:
        raise UsageError(wrong)


def run_verb(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Configure and run one verb in this process; returns its result."""
    return run_values(verb, configure(verb, overrides))


def run_values(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Run one verb with its configured values; returns its result."""
    function = verb_function(verb)
    raise_for_wrong_kind(function, values)
    return function(**values)


def sweep(verb: str, arguments: Sequence[str]) -> int:
    """Hand a --multirun to Hydra; the largest exit code of its jobs.

    Every job runs the verb with its own values. One that fails is complained about at once; the
    others run all the same.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    codes, told = [0], []

    def job(config: Any) -> Any:
        try:
            result = run_values(verb, plain_values(verb, config, HydraConfig.get().overrides.task))
        except Exception as error:
            codes.append(complain(verb, error))
            told.append(error)
            raise
        print(result["summary"], flush=True)
        codes.append(int(result.get("exit", 0)))
        return result.get("objective")

    sys.argv = [f"distill {verb}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here; else Hydra prints them, exit 1
    try:
        hydra.main(config_path="pkg://conf", config_name=verb, version_base="1.3")(job)()
    except Exception as error:
        if isinstance(error, HydraException) and not told:
            raise_for_unknown_key(verb, [a for a in arguments if not a.startswith(("-", "hydra"))])
        if error not in told:
            raise
    return max(codes)


def usage() -> str:
    """The text of `distill --help`."""
    verbs = "\n".join(f"  {verb:10s} {text}" for verb, (_, _, text) in VERBS.items())
    return f"{(__doc__ or '').strip()}\n\nVerbs:\n{verbs}"


def verb_help(verb: str) -> str:
    """A verb's first docstring lines and its configuration with defaults."""
    text = (files("conf") / f"{verb}.yaml").read_text()
    summary = VERBS[verb][2]
    head = f"distill {verb} key=value ...: {summary}"
    return f"{head}\n\nKeys and defaults (??? = must be given):\n{text}"


def complain(verb: str, error: BaseException) -> int:
    """Say what went wrong in one paragraph; returns the exit code."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = 130, "interrupted; the same command goes on where it stopped."
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        code, message = 3, f"{error.strerror}: {error.filename or ''}. Committed work is intact."
    elif isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
        code, message = 2, f"{error.strerror}: {error.filename}"
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        extra = EXTRAS[(error.name or "").split(".")[0]]
        code, message = 3, f"{error.name} is not installed: pip install 'dense-distill[{extra}]'"
    elif type(error).__module__.split(".")[0] in ("hydra", "omegaconf"):
        code, message = 2, f"{_first_lines(error)}\n`distill {verb} --help` shows every key."
    else:
        traceback.print_exception(error)
        code, message = (
            4,
            (
                "this is our bug, not yours. Please report the lines above with the command "
                f"`distill {' '.join(sys.argv[1:])}`; what was committed is intact."
            ),
        )
    kept = [textwrap.fill(line, 100) if len(line) > 100 else line for line in message.splitlines()]
    print(f"distill {verb}: " + "\n".join(kept), file=sys.stderr, flush=True)
    return code


def _first_lines(error: BaseException) -> str:
    text = str(error).partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines += [line for line in str(cause).splitlines() if line.strip()]
    return "\n".join(lines[:30])


@contextlib.contextmanager
def handled_signals(grace_s: float | None = None) -> Iterator[None]:
    """The first SIGTERM or SIGINT lets the verb tidy up; a second one ends it at once.

    So does the end of ``grace_s`` seconds after the first one (None: the verb takes its time).
    Ending at once is safe (what is committed stays) and leaves hidden files for the next run to
    remove.
    """
    seen: list[int] = []

    def handle(number: int, _: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted("terminated (SIGTERM); the same command goes on where it stopped.")

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, handle)
    if before[signal.SIGINT] is not signal.SIG_IGN:  # `nohup`, `&` in a script
        signal.signal(signal.SIGINT, handle)
    try:
        with contextlib.nullcontext() if grace_s is None else ended_after(grace_s):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ended_after(grace_s: float) -> Iterator[None]:
    """Whatever still runs ``grace_s`` seconds after a SIGTERM or SIGINT is ended.

    A thread hears of the signal from the interpreter's wakeup descriptor. The main one may be in a
    wait that the signal does not end, since it came just before it or to another thread, and then
    no handler written in Python ever runs.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()

    def watch() -> None:
        while told := os.read(reading, 1):
            if told[0] in (signal.SIGTERM, signal.SIGINT) and not over.wait(grace_s):
                print(
                    f"distill: not done {grace_s:g} s after the signal, so it ended at once (a "
                    "disk may hang). Sealed shards are intact; the same command goes on.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + told[0])
        os.close(reading)

    watcher = threading.Thread(target=watch, daemon=True, name="grace")
    watcher.start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        over.set()
        os.close(writing)
        watcher.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        print(f"distill: no verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    if any(a in ("-h", "--help") for a in rest):
        print(verb_help(verb))
        return 0
    with handled_signals(GRACE_S if verb == "label" else None):
        try:
            if any(a in ("-m", "--multirun") for a in rest):
                return sweep(verb, rest)
            result = run_verb(verb, rest)
        except SystemExit:
            raise
        except BaseException as error:
            return complain(verb, error)
    print(result["summary"], flush=True)
    return int(result.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
