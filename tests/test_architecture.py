"""The house keeps its plan: floors, vendor doors, one reader of the environment, lengths. Each guard fires here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "aki_megatron"

FLOORS = (
    {"errors"},
    {"config", "flow"},
    {"plan"},
    {"attention"},
    {"model", "data"},
    {"parallel"},
    {"engine", "checkpoint"},
    {"evaluate"},
    {"train"},
)
"""Rooms from the ground up. A room imports from lower floors only; rooms on one floor do not see each other."""

LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}

DOORS = {
    "megatron": {"parallel/megatron.py"},
    "deepspeed": {"engine/zero.py"},
    "webdataset": {"data/shards.py"},
    "transformers": {
        "data/text.py",
        "checkpoint/reference.py",
        "checkpoint/modeling_aki.py",
        "checkpoint/processing_aki.py",
    },
    "wandb": {"train/hooks_wandb.py"},
    "mpi4py": {"parallel/mpi.py"},
}
"""Vendor -> the files of the package that import it."""

TOOL_VENDORS = {"webdataset"}
"""Vendors that tools/ may use too."""

ENVIRONMENT = {"parallel/topology.py"}
"""Files of the package that read the environment; launcher/ does as well."""

LONGEST_FILE, LONGEST_LAUNCHER = 400, 60
"""Lines; a launcher stays below its limit."""


def imported(source: str) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, wherever in the file; relative imports begin with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def floor_breaches(path: str, source: str) -> Iterator[str]:
    """Imports in aki_megatron/<path> that go up or sideways."""
    room = room_of(path)
    for name in imported(source):
        if name.startswith("."):
            yield f"{path}: imports are absolute, not {name}"
        head, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if head != PACKAGE or not other or other == room or room == "__init__":
            continue
        if other not in LEVEL:
            yield f"{path}: {other} is no room of the plan"
        elif LEVEL[other] >= LEVEL[room]:
            yield f"{path}: {room} may not import {other}"


def door_breaches(path: str, source: str) -> Iterator[str]:
    """Vendors that aki_megatron/<path> imports around their door."""
    for name in imported(source):
        vendor = name.partition(".")[0]
        if path not in DOORS.get(vendor, {path}):
            yield f"{path}: {vendor} is imported only in {sorted(DOORS[vendor])}"


def tool_breaches(path: str, source: str) -> Iterator[str]:
    """Vendors that launcher/ or tools/ import although the package has a door for them."""
    for name in imported(source):
        vendor = name.partition(".")[0]
        if vendor in DOORS and not (vendor in TOOL_VENDORS and path.startswith("tools/")):
            yield f"{path}: {vendor} is reached through {PACKAGE}/{sorted(DOORS[vendor])[0]}"


def environment_reads(path: str, source: str) -> Iterator[str]:
    """Lines that read the environment of the process."""
    for node in ast.walk(ast.parse(source)):
        by_attribute = (
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv", "environb")
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
        by_import = isinstance(node, ast.ImportFrom) and node.module == "os"
        by_import = by_import and any(alias.name in ("environ", "getenv", "environb") for alias in node.names)
        if by_attribute or by_import:
            yield f"{path}:{node.lineno}: the environment is read in launcher/ and {sorted(ENVIRONMENT)} only"


def length_breaches(path: str, source: str, limit: int) -> Iterator[str]:
    """Too many lines."""
    lines = source.count("\n")
    if lines > limit:
        yield f"{path}: {lines} lines, {limit} at most"


def files(folder: str) -> list[tuple[str, str]]:
    """(path below the folder, source) of every Python file."""
    top = ROOT / folder
    return [(str(path.relative_to(top)), path.read_text()) for path in sorted(top.rglob("*.py"))]


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path, _ in files(PACKAGE)} - {"__init__"}
    assert rooms <= set(LEVEL), f"give {sorted(rooms - set(LEVEL))} a floor"


def test_imports_go_down() -> None:
    assert [b for path, source in files(PACKAGE) for b in floor_breaches(path, source)] == []


def test_vendors_come_through_their_doors() -> None:
    assert [b for path, source in files(PACKAGE) for b in door_breaches(path, source)] == []
    others = [(f"{folder}/{path}", source) for folder in ("launcher", "tools") for path, source in files(folder)]
    assert [b for path, source in others for b in tool_breaches(path, source)] == []


def test_the_environment_is_read_in_one_place() -> None:
    inside = [(path, source) for path, source in files(PACKAGE) if path not in ENVIRONMENT]
    assert [b for path, source in inside for b in environment_reads(path, source)] == []


def test_files_are_short() -> None:
    limits = {PACKAGE: LONGEST_FILE, "tools": LONGEST_FILE, "tests": LONGEST_FILE, "launcher": LONGEST_LAUNCHER - 1}
    found = [
        breach
        for folder, limit in limits.items()
        for path, source in files(folder)
        for breach in length_breaches(f"{folder}/{path}", source, limit)
    ]
    assert found == []


def test_code_is_ascii() -> None:
    folders = (PACKAGE, "launcher", "tools")
    assert [f"{folder}/{path}" for folder in folders for path, source in files(folder) if not source.isascii()] == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("model/stage.py", "from aki_megatron.parallel.topology import Topology", "model may not import parallel"),
        ("model/stage.py", "from aki_megatron.data import batch", "model may not import data"),
        ("model/stage.py", "from aki_megatron import engine", "model may not import engine"),
        ("model/stage.py", "def f():\n    import aki_megatron.train.loop", "model may not import train"),
        ("config/run.py", "from aki_megatron.flow import ConfigError", "config may not import flow"),
        ("engine/zero.py", "from aki_megatron.checkpoint.saver import Saver", "engine may not import checkpoint"),
        ("flow.py", "from aki_megatron.config.run import RunConfig", "flow may not import config"),
        ("data/text.py", "from aki_megatron.misc import thing", "misc is no room of the plan"),
        ("data/text.py", "from .image import read", "imports are absolute, not .image.read"),
    ],
)
def test_the_floor_guard_fires(path: str, source: str, said: str) -> None:
    assert list(floor_breaches(path, source)) == [f"{path}: {said}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/pipeline.py", "import deepspeed"),
        ("model/linears.py", "from megatron.core import parallel_state"),
        ("data/loader.py", "def f():\n    import webdataset as wds"),
        ("model/decoder.py", "from transformers.models.phi3 import modeling_phi3"),
        ("train/hooks.py", "import wandb"),
    ],
)
def test_the_door_guard_fires(path: str, source: str) -> None:
    assert len(list(door_breaches(path, source))) == 1
    assert list(tool_breaches("launcher/x.py", source)) != []


def test_the_guards_let_pass_what_is_allowed() -> None:
    assert list(floor_breaches("train/build.py", "from aki_megatron.engine.zero import ZeroEngine\nimport torch")) == []
    assert list(floor_breaches("model/stage.py", "from aki_megatron.model.decoder import Block")) == []
    assert list(door_breaches("engine/zero.py", "import deepspeed")) == []
    assert list(tool_breaches("tools/make_data.py", "import webdataset")) == []
    assert list(environment_reads("a.py", "import os\nos.replace('a', 'b')")) == []


@pytest.mark.parametrize(
    "source", ["import os\nx = os.environ['A']", "import os\nos.getenv('A')", "from os import environ"]
)
def test_the_environment_guard_fires(source: str) -> None:
    assert len(list(environment_reads("model/stage.py", source))) == 1


def test_the_length_guard_fires() -> None:
    assert list(length_breaches("a.py", "x\n" * 401, 400)) == ["a.py: 401 lines, 400 at most"]
    assert list(length_breaches("a.py", "x\n" * 400, 400)) == []
