"""README and docs: what they point to exists."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
"""Target of a Markdown link within the checkout."""

NAMED = re.compile(
    r"(?<![\w/.-])((?:aki_megatron|launcher|configs|tools|tests|slurm|docs)/[\w./-]*\.(?:py|yaml|json|sbatch|sh|env|md))\b"
)
"""A file of the checkout that a sentence or command names."""

TO_BE_ADDED = {"aki_megatron/data/sources/textcaps.py"}
"""Files that docs/extending.md has its reader write."""


def missing_files(document: Path) -> Iterator[str]:
    """What a document points to or names and is not there."""
    text = document.read_text()
    targets = {document.parent / name for name in LINK.findall(text)} | {
        ROOT / name for name in set(NAMED.findall(text)) - TO_BE_ADDED
    }
    yield from (f"{document.name}: {target}" for target in sorted(targets) if not target.exists())


def test_every_file_that_a_document_names_exists() -> None:
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert [problem for document in documents for problem in missing_files(document)] == []


def test_the_check_fires(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "[here](page.md#top) [gone](gone.md), `python tools/gone.py`, tools/serve.py, [web](https://x.org/a)"
    )
    missing = {f"page.md: {ROOT / 'tools/gone.py'}", f"page.md: {tmp_path / 'gone.md'}"}
    assert set(missing_files(document)) == missing
