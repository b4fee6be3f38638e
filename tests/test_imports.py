"""Who may import whom: the rooms of the design, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.servers import ROOT

PACKAGE = ROOT / "lungseg"
FILES = sorted(PACKAGE.rglob("*.py"))
# In the order of the chain: a room may import itself and the rooms before it, but for those named.
ROOMS: dict[str, set[str]] = {
    "warm": set(),
    "worker_setup": set(),
    "errors": {"warm", "worker_setup"},
    "show": {"warm", "worker_setup"},
    "config": {"show"},
    "storage": {"show"},
    "telemetry": {"storage"},
    "exporter": {"storage"},
    "nodes": {"errors", "show", "config", "storage", "telemetry", "exporter"},
    "cluster": {"storage"},
    "scan": {"storage"},
    "dataset": set(),
    "sources": set(),
    "stream": {"sources"},
    "model": {"storage", "sources", "stream"},
    "runs": {"sources"},
    "train": {"sources"},
    "tune": {"sources"},
    "segment": {"dataset", "sources", "stream", "train", "tune"},
    "evaluate": {"train", "tune"},
    "submit": {"dataset", "sources", "stream", "model", "train", "tune", "segment", "evaluate"},
    "demo": set(),
    "doctor": set(),
    "cli": set(),
}
ORDER = list(ROOMS)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "lungseg"


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at module level) of every import, those inside functions too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {file}"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in inner


GRAPH = {file: list(imports(file)) for file in FILES}


def users(*packages: str, module_level: bool = False) -> set[str]:
    """Our modules that import one of the packages."""
    prefixes = tuple(f"{package}." for package in packages)
    return {
        module_of(file)
        for file, found in GRAPH.items()
        for name, top in found
        if f"{name}.".startswith(prefixes) and (top or not module_level)
    }


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_point_one_way(file: Path) -> None:
    here = room_of(module_of(file))
    for name, _ in GRAPH[file]:
        there = room_of(name)
        if not name.startswith("lungseg.") or there in (here, "__version__"):
            continue
        assert ORDER.index(there) < ORDER.index(here), f"{module_of(file)} imports {name}"
        assert there not in ROOMS[here], f"{module_of(file)} imports {name}"


def test_every_module_has_its_room() -> None:
    assert {room_of(module_of(file)) for file in FILES} == {"lungseg", *ROOMS}


def test_errors_import_nothing_of_ours_and_config_only_errors() -> None:
    for room, allowed in (("errors", set()), ("config", {"errors"}), ("storage", {"errors", "config"})):
        for file in (one for one in FILES if room_of(module_of(one)) == room):
            found = {room_of(name) for name, _ in GRAPH[file] if name.startswith("lungseg.")}
            assert found <= {room, *allowed}


def test_only_storage_speaks_to_object_stores() -> None:
    assert users("boto3", "botocore", "pyarrow.fs", "s3fs", "fsspec") == {
        "lungseg.storage.s3",
        "lungseg.storage.s3_connections",
        "lungseg.storage.s3_errors",
    }


def test_only_a_few_modules_know_ray() -> None:
    allowed = {"lungseg.cluster", "lungseg.nodes", "lungseg.warm", "lungseg.dataset.prepare"}
    allowed |= {"lungseg.exporter", "lungseg.tune.search", "lungseg.submit.jobs"}
    allowed |= {f"lungseg.train.{name}" for name in ("launch", "ready", "stop", "worker")}
    assert users("ray") <= allowed
    assert users("ray", module_level=True) == set()


def test_tensorflow_is_imported_at_the_head_of_few_modules() -> None:
    heads = users("tensorflow", "keras", module_level=True)
    training = {f"lungseg.train.{name}" for name in ("strategy", "step", "loop", "optimizer")}
    training |= {"lungseg.runs.best", "lungseg.runs.export"}
    assert {name for name in heads if room_of(name) != "model"} <= training


def test_nothing_needs_pylidc_or_the_screen_at_import() -> None:
    assert users("pylidc", "matplotlib", "typer.testing", module_level=True) == set()


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_keras_is_never_reached_through_tensorflow_and_numpy_is_left_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        name = f"{node.value.id}.{node.attr}"
        assert name not in ("tf.keras", "tf.losses", "tf.optimizers", "tf.metrics")
        assert not (node.value.id == "np" and isinstance(node.ctx, ast.Store)), f"sets {name}"


KEYS = re.compile(
    r"(^|/)(runs|data|scans|shards|volumes|checkpoints|claims|trials)/|(best|run|manifest)\.json"
)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_one_module_writes_keys_of_the_store(file: Path) -> None:
    if module_of(file) == "lungseg.storage.keys":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
            assert not KEYS.search(text), f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    top = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    rooms = {"lungseg", "deploy", "helm", "jobs", "tests"}
    files = {"Dockerfile", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= rooms | files
