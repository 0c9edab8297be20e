"""Layers, one adapter per vendor, one reader of the environment, file length. Each check has a test that it fires."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "aki_megatron"

LAYERS = (
    {"masking", "console", "argument_types"},
    {"errors"},
    {"types", "families", "hashing"},
    {"config"},
    {"plan"},
    {"attention"},
    {"model", "data"},
    {"parallel"},
    {"engine", "checkpoint"},
    {"evaluate", "synthetic", "supervise"},
    {"train"},
)
"""Packages from the bottom layer up. A package imports from lower layers only, never from its own layer."""

LEVEL = {package: level for level, layer in enumerate(LAYERS) for package in layer}

ADAPTERS = {
    "megatron": {"parallel/megatron.py"},
    "deepspeed": {"engine/zero_stage.py"},
    "webdataset": {"data/shards.py", "data/shard_writer.py"},
    "transformers": {
        "data/log_mel.py",
        "data/tokenizer.py",
        "checkpoint/hf_reference.py",
        "checkpoint/configuration_aki.py",
        "checkpoint/modeling_aki.py",
        "checkpoint/processing_aki.py",
        "checkpoint/image_processing_aki.py",
    },
    "wandb": {"train/wandb_callback.py"},
    "pyarrow": {"data/sources/parquet_rows.py", "data/shard_writer.py", "evaluate/benchmarks/parquet.py"},
    "rich": {"console.py"},
    "mpi4py": {"parallel/mpi.py"},
    "starlette": {"evaluate/serving/web.py"},
    "uvicorn": {"evaluate/serving/server.py"},
    "python_multipart": {"evaluate/serving/form.py"},
    "nltk": {"evaluate/attention_analysis/taggers.py"},
    "textblob": {"evaluate/attention_analysis/taggers.py"},
}
"""Vendor -> the files of the package that import it."""

EXPORTED_IMPORTS = {
    ("checkpoint/modeling_aki.py", ".configuration_aki.AkiConfig"),
    ("checkpoint/processing_aki.py", ".image_processing_aki.AkiImageProcessor"),
    ("checkpoint/processing_aki.py", ".image_processing_aki.flatten_images"),
}
"""Relative imports of files that are copied into exported folders, where transformers asks for them."""

TOOL_VENDORS = {"webdataset", "transformers"}
"""Vendors that tools/ may use too: benchmarks compare with them."""

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


def package_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def layer_violations(path: str, source: str) -> Iterator[str]:
    """Imports in aki_megatron/<path> that go up or sideways."""
    package = package_of(path)
    for name in imported(source):
        if name.startswith(".") and (path, name) not in EXPORTED_IMPORTS:
            yield f"{path}: imports are absolute, not {name}"
        head, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if head != PACKAGE or not other or other == package or package == "__init__":
            continue
        if other not in LEVEL:
            yield f"{path}: {other} is not a package of the project"
        elif LEVEL[other] >= LEVEL[package]:
            yield f"{path}: {package} may not import {other}"


def adapter_violations(path: str, source: str) -> Iterator[str]:
    """Vendors that aki_megatron/<path> imports around their adapter."""
    for name in imported(source):
        vendor = name.partition(".")[0]
        if path not in ADAPTERS.get(vendor, {path}):
            yield f"{path}: {vendor} is imported only in {sorted(ADAPTERS[vendor])}"


def tool_violations(path: str, source: str) -> Iterator[str]:
    """Vendors that launcher/ or tools/ import although the package has an adapter for them."""
    for name in imported(source):
        vendor = name.partition(".")[0]
        if vendor in ADAPTERS and not (vendor in TOOL_VENDORS and path.startswith("tools/")):
            yield f"{path}: {vendor} is reached through {PACKAGE}/{sorted(ADAPTERS[vendor])[0]}"


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


def length_violations(path: str, source: str, limit: int) -> Iterator[str]:
    """Too many lines."""
    lines = source.count("\n")
    if lines > limit:
        yield f"{path}: {lines} lines, {limit} at most"


def files(folder: str) -> list[tuple[str, str]]:
    """(path below the folder, source) of every Python file."""
    top = ROOT / folder
    return [(str(path.relative_to(top)), path.read_text()) for path in sorted(top.rglob("*.py"))]


def test_every_package_has_a_layer() -> None:
    packages = {package_of(path) for path, _ in files(PACKAGE)} - {"__init__"}
    assert packages <= set(LEVEL), f"give {sorted(packages - set(LEVEL))} a layer"


def test_imports_go_down() -> None:
    assert [b for path, source in files(PACKAGE) for b in layer_violations(path, source)] == []


def test_vendors_come_through_their_adapters() -> None:
    assert [b for path, source in files(PACKAGE) for b in adapter_violations(path, source)] == []
    others = [(f"{folder}/{path}", source) for folder in ("launcher", "tools") for path, source in files(folder)]
    assert [b for path, source in others for b in tool_violations(path, source)] == []


def test_the_environment_is_read_in_one_place() -> None:
    inside = [(path, source) for path, source in files(PACKAGE) if path not in ENVIRONMENT]
    assert [b for path, source in inside for b in environment_reads(path, source)] == []


def test_files_are_short() -> None:
    limits = {PACKAGE: LONGEST_FILE, "tools": LONGEST_FILE, "tests": LONGEST_FILE, "launcher": LONGEST_LAUNCHER - 1}
    found = [
        violation
        for folder, limit in limits.items()
        for path, source in files(folder)
        for violation in length_violations(f"{folder}/{path}", source, limit)
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
        ("config/run.py", "from aki_megatron.attention.rules import RULES", "config may not import attention"),
        (
            "engine/zero_stage.py",
            "from aki_megatron.checkpoint.checkpointer import Checkpointer",
            "engine may not import checkpoint",
        ),
        ("types.py", "from aki_megatron.config.run import RunConfig", "types may not import config"),
        ("data/tokenizer.py", "from aki_megatron.misc import thing", "misc is not a package of the project"),
        ("data/tokenizer.py", "from .image import read", "imports are absolute, not .image.read"),
    ],
)
def test_the_layer_guard_fires(path: str, source: str, said: str) -> None:
    assert list(layer_violations(path, source)) == [f"{path}: {said}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/pipeline.py", "import deepspeed"),
        ("model/linears.py", "from megatron.core import parallel_state"),
        ("data/loader.py", "def f():\n    import webdataset as wds"),
        ("model/decoder.py", "from transformers.models.phi3 import modeling_phi3"),
        ("train/callbacks.py", "import wandb"),
        ("train/build.py", "from rich.console import Console"),
    ],
)
def test_the_adapter_guard_fires(path: str, source: str) -> None:
    assert len(list(adapter_violations(path, source))) == 1
    assert list(tool_violations("launcher/x.py", source)) != []


def test_the_guards_let_pass_what_is_allowed() -> None:
    assert (
        list(layer_violations("train/build.py", "from aki_megatron.engine.zero_stage import ZeroEngine\nimport torch"))
        == []
    )
    assert list(layer_violations("model/stage.py", "from aki_megatron.model.decoder import DecoderLayer")) == []
    assert list(adapter_violations("engine/zero_stage.py", "import deepspeed")) == []
    assert list(tool_violations("tools/make_data.py", "import webdataset")) == []
    assert list(environment_reads("a.py", "import os\nos.replace('a', 'b')")) == []


@pytest.mark.parametrize(
    "source", ["import os\nx = os.environ['A']", "import os\nos.getenv('A')", "from os import environ"]
)
def test_the_environment_guard_fires(source: str) -> None:
    assert len(list(environment_reads("model/stage.py", source))) == 1


def test_the_length_guard_fires() -> None:
    assert list(length_violations("a.py", "x\n" * 401, 400)) == ["a.py: 401 lines, 400 at most"]
    assert list(length_violations("a.py", "x\n" * 400, 400)) == []
