"""The four houses and their arrows, a light import, and the frozen set of config keys."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOUSES = ("teacher", "student", "distill", "export")
ALLOWED = {
    "teacher": {"teacher"},
    "student": {"student"},
    "distill": {"distill", "teacher", "student"},
    "export": {"export", "teacher", "student"},
}
# a heavy package -> the modules that may import it at their top level
HEAVY_AT_HOME = {
    "mitsuba": {"teacher/scenes.py", "teacher/scene_objects.py"},
    "diffusers": set(),
    "pyarrow": set(),
    "tensorrt": set(),
    "ray": set(),
}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("house", HOUSES)
def test_arrows_point_only_where_allowed(house):
    for path in (ROOT / house).rglob("*.py"):
        ours = imports(path) & set(HOUSES)
        assert ours <= ALLOWED[house], f"{path} imports {sorted(ours - ALLOWED[house])}"


def test_heavy_packages_are_imported_in_their_own_room_only():
    for house in HOUSES:
        for path in (ROOT / house).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            for package in imports(path, top_level_only=True) & set(HEAVY_AT_HOME):
                assert name in HEAVY_AT_HOME[package], f"{name} imports {package} at its top"


def test_importing_the_label_side_loads_no_torch():
    modules = "teacher, teacher.label, teacher.metrics, teacher.codecs.depth, teacher.store"
    code = (
        f"import sys, {modules}; print(sorted(set(sys.modules) & {{'torch', 'numba', 'mitsuba'}}))"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def flatten(value, prefix=""):
    if not isinstance(value, dict):
        return [prefix]
    return [
        k
        for name, sub in value.items()
        for k in flatten(sub, f"{prefix}.{name}" if prefix else name)
    ]


def test_config_keys_are_frozen():
    """A key is a promise: add or remove one only together with this file's list."""
    found = {}
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        values = yaml.safe_load(path.read_text()) or {}
        values.pop("defaults", None)
        found[path.relative_to(ROOT / "conf").as_posix()] = sorted(flatten(values))
    frozen = json.loads((ROOT / "tests" / "config_keys.json").read_text())
    assert found == frozen


def test_every_verb_takes_exactly_its_yaml_keys():
    """Config stops at the door: the YAML's keys are the function's keyword-only arguments."""
    import inspect

    from distill.cli import VERBS, verb_function

    for verb in VERBS:
        values = yaml.safe_load((ROOT / "conf" / f"{verb}.yaml").read_text()) or {}
        groups = [d for d in values.pop("defaults", []) if d != "_self_"]
        names = set(values)
        for group in groups:
            name = next(iter(group)) if isinstance(group, dict) else group
            name = name.removeprefix("optional ").removeprefix("override ")
            names.add(name.split("@")[-1].strip("/").split(".")[0])
        parameters = inspect.signature(verb_function(verb)).parameters
        assert names == set(parameters), verb
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values()), verb
