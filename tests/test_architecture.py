"""What keeps the house in order: who imports whom, what a room may be called, and that the README's map is true."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastft

ROOT = Path(__file__).resolve().parent.parent
STDLIB = set(sys.stdlib_module_names)

# A module imports from its own level and below. What is not listed stands on level 3: tasks, data, patching, models ...
LEVELS = {"__main__": 6, "cli": 5, "train": 4, "predict": 4, "doctor": 4, "nn": 2, "ops": 1, "fastft_kernels": 0}
BESIDE = {"arguments", "launch"}  # import the standard library only, so anyone may import them


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path, *, top_level_only=False):
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(name):
    """The room in `fastft/` (or fastft_kernels) that a dotted name points into; None for other libraries."""
    parts = name.split(".")
    if parts[0] == "fastft_kernels":
        return "fastft_kernels"
    if parts[0] != "fastft" or len(parts) == 1:
        return None
    if (ROOT / "fastft" / parts[1]).is_dir() or (ROOT / "fastft" / f"{parts[1]}.py").exists():
        return parts[1]
    return fastft._FUNCTIONS[parts[1]].split(".")[1] if parts[1] in fastft._FUNCTIONS else None


def room_of_file(path):
    return path.relative_to(ROOT / "fastft").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", python_files("fastft"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = room_of_file(path)
    for name in imports(path):
        other = room(name)
        if other is None or other in BESIDE or other == own:
            continue
        level, its_level = LEVELS.get(own, 3), LEVELS.get(other, 3)
        is_below = its_level < level or its_level == level == 3
        assert is_below and own not in BESIDE, f"{own} may not import {name}"
        assert other != "fastft_kernels" or own == "ops", f"only fastft/ops imports fastft_kernels, not {own}"


def test_no_room_imports_in_a_circle():
    graph = {}
    for path in python_files("fastft"):
        own = room_of_file(path)
        if own != "__init__":
            graph.setdefault(own, set()).update(room(n) for n in imports(path, top_level_only=True))
            graph[own] -= {None, own}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", sorted(BESIDE))
def test_stands_beside(name):
    top = {n.split(".")[0] for n in imports(ROOT / "fastft" / f"{name}.py", top_level_only=True)}
    assert top <= STDLIB


@pytest.mark.parametrize("path", python_files("fastft/ops", "fastft/nn"), ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_and_layers_know_torch_only(path):
    assert {n.split(".")[0] for n in imports(path)} <= STDLIB | {"torch", "fastft", "fastft_kernels"}


@pytest.mark.parametrize("path", python_files("kernels"), ids=lambda path: str(path.relative_to(ROOT / "kernels")))
def test_kernels_know_torch_and_triton_only(path):
    names = imports(path)
    assert {n.split(".")[0] for n in names} <= STDLIB | {"torch", "triton", "fastft_kernels"}
    if "reference" in path.parts:  # the specification depends on none of its implementations
        assert not {n for n in names if re.match(r"triton|fastft_kernels\.(triton|cpp|_C)", n)}


def test_kernels_is_a_room_not_a_package():
    # With an __init__.py it would shadow Hugging Face's package `kernels` for everything started from the repository root,
    # and `import transformers` fails where that one is installed.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.name not in ("__pycache__", "fastft_kernels")] == []


def test_no_module_takes_the_name_of_a_library():
    # `deepspeed fastft/train.py` puts the folder fastft/ first on sys.path.
    libraries = set(importlib.metadata.packages_distributions()) - {"fastft"}
    ours = {room_of_file(path) for path in python_files("fastft")} - {"__init__", "__main__"}
    assert not ours & (STDLIB | libraries)


def test_import_fastft_is_free():
    code = "import fastft, sys; print(*sorted({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_pinned_versions_are_allowed_ones():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {r.name: next(iter(r.specifier)).version for r in map(Requirement, (x for x in lines if x[:1] != "#"))}
    for requirement in map(Requirement, importlib.metadata.requires("fastft")):
        if requirement.name != "wandb":  # an extra that CI does not install
            assert requirement.specifier.contains(pinned[requirement.name]), (
                f"{requirement} excludes the version pinned"
            )


def readme_tree():
    """Paths that the map of rooms in the README names: the fenced block after the heading, nested by four spaces."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Map of rooms\s+```\n(.*?)```", text, re.DOTALL).group(1)
    parents, paths = [], set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        words = re.split(r"\s{2,}", line.strip())
        names = [word for word in words if re.fullmatch(r"[\w./-]+(/|\.\w+)|Makefile|LICENSE", word)]
        parents = parents[:depth]
        paths |= {Path(*parents, name) for name in names}
        if names and names[0].endswith("/"):
            parents.append(names[0])
    return paths


def test_what_the_readme_names_exists():
    missing = sorted(str(path) for path in readme_tree() if not (ROOT / path).exists())
    assert not missing, f"the README's map of rooms names {', '.join(missing)}"


def test_the_readme_names_what_exists():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout, so what was built here cannot be told from what belongs here")
    paths = [Path(line) for line in files.stdout.splitlines()]
    folders = {folder for path in paths for folder in path.parents if folder.name}
    rooms = {f for f in folders if len(f.parts) == 1 or f.parts[0] == "fastft" or f.parent.name == "fastft_kernels"}
    rooms |= {path for path in paths if re.fullmatch(r"fastft/\w+\.py", path.as_posix())}
    named = readme_tree()
    missing = sorted(
        str(room)
        for room in rooms
        if not room.name.startswith((".", "__")) and not any(room == n or room in n.parents for n in named)
    )
    assert not missing, f"the README's map of rooms does not name {', '.join(missing)}"
