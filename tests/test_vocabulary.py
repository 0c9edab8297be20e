"""Identifiers and prose that must not come back: private words for things that have a standard name."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WORDS: dict[str, str] = {
    "wish": "control request",
    "wishes": "control signals",
    "judge": "loss-spike guard",
    "pulse": "progress tracker",
    "parcel": "pending receive",
    "parked": "buffered",
    "ledger": "sample audit log",
    "accuse": "report",
    "blame": "straggler",
    "certify": "assert_no_leak",
    "keyed": "seeded",
    "interrupts": "stop signals",
    "nudged": "perturbed",
    "parted": "diverged",
    "theirs": "external",
    "peek": "read_text",
}
"""Word inside an identifier (snake or camel case) -> what to say instead."""

IDENTIFIERS: dict[str, str] = {
    "Carry": "StageActivations",
    "Wire": "P2PCommunicator",
    "MicroSize": "MicrobatchShape",
    "StageRunner": "ShardedStage",
    "ReplicaStage": "DDPStage",
    "ModalityLayout": "AttentionMask",
    "Look": "MaskSpec",
    "Pieces": "MaskBlocks",
    "Stray": "MaskBlocks",
    "Front": "InputEmbedder",
    "PlainLinears": "LocalLinears",
    "place_images": "scatter_media_embeds",
    "edge_group": "embedding_group",
    "alone_group": "self_group",
    "HangWatch": "Watchdog",
    "FailureWatch": "FailureReporter",
    "Hook": "Callback",
    "RunFolder": "RunPaths",
    "Losses": "BadSampleBudget",
    "TooManyLost": "BadSampleBudgetExceeded",
    "StepPlanner": "BatchPlanner",
    "PackedOrder": "PackedSampler",
    "RowPlace": "PackingState",
    "Saver": "Checkpointer",
    "OtherSide": "HFReferenceModel",
    "as_ours": "to_native",
    "as_theirs": "to_external",
    "go_back": "rollback",
    "global_batch": "global_batch_size",
    "micro_batch": "micro_batch_size",
    "clip_norm": "max_grad_norm",
    "check_every": "mask_check_interval",
    "kv_heads": "num_kv_heads",
    "mlp_width": "intermediate_size",
    "head_width": "head_dim",
    "vocab_rows": "padded_vocab_size",
    "base_tokens": "vocab_size",
    "extra_tokens": "num_added_tokens",
    "row_tokens": "sequence_length",
    "row_images": "max_images",
    "block_samples": "buffer_size",
    "hang_seconds": "step_timeout",
    "start_seconds": "init_timeout",
    "held_out": "val",
    "logical": "global state",
}
"""Whole identifier -> what to say instead."""

PROSE = re.compile(r"\b(house|houses|river|rivers|nouns?|rooms?|doors?|wish|wishes|ledger)\b", re.IGNORECASE)
"""Words that no docstring or comment of this project needs."""


def parts(identifier: str) -> set[str]:
    """Words of an identifier in snake or camel case, lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return {word for word in spaced.lower().split("_") if word}


def bad_identifiers(path: str, source: str) -> Iterator[str]:
    """Names in a Python file that have a standard name instead."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.NAME:
            continue
        name, line = token.string, token.start[0]
        if name in IDENTIFIERS:
            yield f"{path}:{line}: {name}: say {IDENTIFIERS[name]}"
        for word in sorted(parts(name) & WORDS.keys()):
            yield f"{path}:{line}: {name}: say {WORDS[word]}"


def bad_prose(path: str, source: str) -> Iterator[str]:
    """Docstrings and comments of a Python file with words that explain nothing."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (found := PROSE.search(token.string)):
            yield f"{path}:{token.start[0]}: comment with {found.group()!r}"
    for node in ast.walk(ast.parse(source)):
        text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
        if isinstance(text, str) and (found := PROSE.search(text)):
            yield f"{path}:{node.lineno}: docstring with {found.group()!r}"


def python_files() -> list[tuple[str, str]]:
    """(path below the root, source) of every Python file of the project but this one."""
    folders = ("aki_megatron", "launcher", "tools", "tests")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), path.read_text()) for path in found if path != Path(__file__).resolve()]


def test_identifiers_are_standard_terms() -> None:
    assert [problem for path, source in python_files() for problem in bad_identifiers(path, source)] == []


def test_docstrings_and_comments_are_plain() -> None:
    assert [problem for path, source in python_files() for problem in bad_prose(path, source)] == []


def test_documents_name_nothing_by_its_old_name() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    scripts = [path for folder in ("configs", "slurm") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    old = re.compile(r"\b(" + "|".join(name for name in IDENTIFIERS if "_" in name) + r")\b")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in [*documents, *scripts]
        for pattern in (old, PROSE)
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["class Carry: pass", "self.ledger = 1", "def train(wish): pass", "from x import StageRunner", "LossJudge()"],
)
def test_the_identifier_check_fires(source: str) -> None:
    assert len(list(bad_identifiers("a.py", source))) == 1


@pytest.mark.parametrize("source", ['"""The only door to it."""', "x = 1  # every room has one"])
def test_the_prose_check_fires(source: str) -> None:
    assert len(list(bad_prose("a.py", source))) == 1


def test_the_checks_let_standard_terms_pass() -> None:
    source = '"""Keep at most k files."""\nfor batch in microbatches:\n    swish(batch.place, knowledge)\n'
    assert [*bad_identifiers("a.py", source), *bad_prose("a.py", source)] == []
