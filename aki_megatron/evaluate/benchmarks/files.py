"""Find the files of a benchmark and read its questions. Nothing is downloaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, TsvFile
from aki_megatron.evaluate.benchmarks.parquet import read_parquet_records
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, check_unique
from aki_megatron.evaluate.benchmarks.tsv import md5_of, read_tsv_records


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a benchmark and where they are from.

    source  files, with the MD5 of a table and whether it is VLMEvalKit's
    notes   what makes scores of this file not comparable
    """

    benchmark: Benchmark
    questions: tuple[BenchmarkQuestion, ...]
    source: str
    notes: tuple[str, ...] = ()


class MissingFiles(DataError):  # noqa: N818 (an error, and its name says which)
    """No file of a benchmark is there; the message says where to get one."""


def load_questions(
    benchmark: Benchmark, roots: Sequence[Path], progress: Callable[[str], None] = lambda line: None
) -> QuestionSet:
    """Read a benchmark's questions from the first folder of ``roots`` that has its files.

    A root may also be the benchmark's table itself. In each root VLMEvalKit's table is looked for first, then parquet
    files. ``progress`` is called before each file with a line about it.
    Raises MissingFiles where there is no file (it says where to get one and where it was looked for), DataError for a
    damaged file, one of another benchmark, and ids that are there twice.
    """
    looked_for: list[Path] = []
    for root in roots:
        if tables := _find_tables(benchmark, root, looked_for):
            return _read_tables(benchmark, tables, progress)
        if files := _find_parquet(benchmark, root, looked_for):
            return _read_parquet(benchmark, files, progress)
    tsv = " and ".join(file.url for file in benchmark.tsv_files)
    hub = " or ".join(dict.fromkeys(files.url for files in benchmark.hub_files))
    places = "\n  ".join(map(str, looked_for)) or "(no folder given; give one with --data)"
    raise MissingFiles(
        f"The files of {benchmark.name} are missing. Get {tsv}, or the parquet files of {hub}; nothing is downloaded "
        f"here. Looked for:\n  {places}"
    )


def _find_tables(benchmark: Benchmark, root: Path, looked_for: list[Path]) -> list[tuple[TsvFile, Path]]:
    """Return all tables of a benchmark in a root; a part of them is an error."""
    if root.is_file():
        named = [file for file in benchmark.tsv_files if root.name in (f"{file.name}.tsv", f"{file.name}_local.tsv")]
        looked_for += [] if named else [root]
        return [(file, root) for file in named]
    found: list[tuple[TsvFile, Path]] = []
    missing: list[TsvFile] = []
    for file in benchmark.tsv_files:
        candidates = [root / f"{file.name}.tsv", root / f"{file.name}_local.tsv"]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            missing.append(file)
            looked_for.append(candidates[0])
        else:
            found.append((file, path))
    if found and missing:
        raise DataError(
            f"{benchmark.name} has {len(benchmark.tsv_files)} tables, and {root} lacks "
            f"{', '.join(f'{file.name}.tsv' for file in missing)}. Get {' and '.join(file.url for file in missing)}."
        )
    return found


def _find_parquet(benchmark: Benchmark, root: Path, looked_for: list[Path]) -> list[Path]:
    """Return the parquet files of a benchmark's splits in a root: as downloaded, or in a cache of the hub."""
    for files in benchmark.hub_files:
        owner, name = files.repo.split("/")
        cache = root / f"datasets--{owner}--{name}" / "snapshots"
        snapshots = sorted(cache.glob("*"), reverse=True) or [cache / "*"]
        itself = [root] if root.name == name else []
        for folder in (*itself, root / owner / name, root / name, *snapshots):
            if found := _parquet_in(folder, files):
                return found
            looked_for.append(folder / (files.config or "**") / f"{files.splits[0]}*.parquet")
    return []


def _parquet_in(folder: Path, files: HubFiles) -> list[Path]:
    found = sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(files.splits))
    if files.config:
        found = [path for path in found if files.config in path.relative_to(folder).parts[:-1]]
    return found


def _read_tables(
    benchmark: Benchmark, tables: Sequence[tuple[TsvFile, Path]], progress: Callable[[str], None]
) -> QuestionSet:
    questions: list[BenchmarkQuestion] = []
    sources, notes = [], []
    for file, path in tables:
        progress(f"{benchmark.name}: {path}")
        md5 = md5_of(path)
        if md5 in benchmark.wrong_md5s:
            raise DataError(f"{path} is {benchmark.wrong_md5s[md5]} (MD5 {md5}), not {file.name}; get that one.")
        is_known = md5 == file.md5
        sources.append(f"{path} (MD5 {md5}, {'' if is_known else 'not '}VLMEvalKit's {file.name})")
        if not is_known:
            notes.append(f"{path.name} has MD5 {md5}, VLMEvalKit's {file.name} {file.md5}: scores are of another file.")
        questions += _questions(read_tsv_records(path), benchmark.read_tsv)
    return _finished(benchmark, questions, tables[0][1], "; ".join(sources), notes)


def _read_parquet(benchmark: Benchmark, files: Sequence[Path], progress: Callable[[str], None]) -> QuestionSet:
    questions: list[BenchmarkQuestion] = []
    for path in files:
        progress(f"{benchmark.name}: {path}")
        questions += _questions(read_parquet_records(path), benchmark.read_parquet)
    count, expected = len(questions), benchmark.num_hub_questions
    notes = [] if count == expected else [f"The files have {count} questions, the public ones {expected}."]
    source = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return _finished(benchmark, questions, files[0], source, notes)


def _questions(
    records: Sequence[Record], read: Callable[[Record], BenchmarkQuestion | None]
) -> list[BenchmarkQuestion]:
    return [question for record in records if (question := read(record)) is not None]


def _finished(
    benchmark: Benchmark, questions: Sequence[BenchmarkQuestion], path: Path, source: str, notes: Sequence[str]
) -> QuestionSet:
    questions = benchmark.finish(questions, path)
    if not questions:
        raise DataError(f"{path} holds no question of {benchmark.name}; get it again.")
    check_unique(questions, path)
    without = [question.id for question in questions if not question.images]
    if without:
        notes = [*notes, f"{len(without)} questions have no image (first: {', '.join(without[:5])})."]
    return QuestionSet(benchmark, tuple(questions), source, tuple(notes))
