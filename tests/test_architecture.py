"""The rules of the house: who may import whom, the packages, the names that are forbidden."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
ROOMS = ("data", "models", "training", "sampling", "coding", "evaluation")
SOURCES = sorted(
    path
    for room in ("pipeline", "tokenizers", "jobs", "configs")
    for path in TOP.glob(f"{room}/**/*.py")
)
FORBIDDEN_FILES = {"tokenize", "logging", "profile", "random", "queue"} | {
    "utils",
    "common",
    "helpers",
    "misc",
    "manager",
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def room_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(TOP).parts[:-1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(TOP)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("pipeline", "jobs", "configs"), f"{name}: loads a second copy"
        if parts[0] != "chainrule" or len(parts) < 3:
            continue
        if room[0] == "pipeline":
            assert parts[1] not in ("jobs", "tokenizers"), f"{path} imports {name}"
        if room[0] == "tokenizers":
            assert parts[1] == "tokenizers", f"{path} imports {name}"
        if len(room) > 1 and room[1] in ("data", "models", "coding") and parts[1] == "pipeline":
            if room[1] == "coding" and parts[2:4] == ["training", "optimizers"]:
                continue  # a model that learns while it codes
            assert parts[2] == room[1] or parts[2] not in ROOMS, f"{path} imports {name}"


def test_only_the_engine_names_accelerate_and_deepspeed() -> None:
    for path in SOURCES:
        if path == TOP / "pipeline" / "training" / "engine.py":
            continue
        named = {name.split(".")[0] for name in imports(path)} & {"accelerate", "deepspeed"}
        assert not named, f"{path} imports {named}"


def test_every_package_is_listed() -> None:
    listed = set(
        tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {"chainrule." + ".".join(room_of(path)) for path in SOURCES}
    assert listed == found


def test_forbidden_names() -> None:
    assert not (TOP / "tokenizers" / "__init__.py").exists()
    assert not {path.stem for path in SOURCES} & FORBIDDEN_FILES


def test_nothing_unpickles() -> None:
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "joblib"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said.get("weights_only", "True") == "True", path
                assert said.get("allow_pickle", "False") == "False", path
