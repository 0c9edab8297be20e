"""Evaluate a model: its run's own val questions, or the papers' benchmarks.

    python tools/evaluate.py runs/demo/sft                     # the val questions of a fine-tuned run
    python tools/evaluate.py runs/demo/sft --per_task 100      # at most 100 questions per task

    python tools/evaluate.py run MODEL --out FOLDER --score    # answer the benchmarks' questions: a run, a checkpoint
    torchrun --nproc_per_node 8 tools/evaluate.py run MODEL --out FOLDER        # ... with eight GPUs; resumable
    python tools/evaluate.py score FOLDER                      # score the predictions of a folder, again and again
    python tools/evaluate.py score FOLDER --rules head2026 --mmmu_parser official
    python tools/evaluate.py score FOLDER --judge https://api.openai.com/v1 --judge_model gpt-4-0613
    python tools/evaluate.py report FOLDER [FOLDER ...]        # the twelve columns beside the papers' published rows
    python tools/evaluate.py export FOLDER --to vlmevalkit --out outputs --model my-model
    python tools/evaluate.py check --data /datasets/benchmarks # which benchmarks' files are there, and their MD5
    python tools/evaluate.py golden FOLDER                     # the scorers against recorded verdicts; 1 on a mismatch

Options of a command: python tools/evaluate.py score --help. A run folder whose name is that of a command: ./score.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from aki_megatron.console import Console, Table
from aki_megatron.errors import ConfigError, UserError
from aki_megatron.evaluate.benchmark_folder import folder_predictions, load_scores, score_folder
from aki_megatron.evaluate.benchmark_report import conditions_table, format_value, short_table, write_reports
from aki_megatron.evaluate.benchmarks.benchmark import MMMU_PARSERS, ScoringOptions
from aki_megatron.evaluate.benchmarks.files import load_questions
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS, find_benchmark
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, ScoreTable
from aki_megatron.evaluate.export import FORMATS, export_lmms_eval, export_vlmevalkit
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.golden_replies import check_folder, unknown_files
from aki_megatron.evaluate.judges.api import ApiJudge
from aki_megatron.evaluate.judges.cache import CachedJudge, ReplayedJudge
from aki_megatron.evaluate.judges.heuristic import HeuristicJudge
from aki_megatron.evaluate.judges.judge import Judge
from aki_megatron.evaluate.judges.prompts import DEFAULT_PROMPTS, load_prompts

RAW = argparse.RawDescriptionHelpFormatter
console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, ``val`` if none is named; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command = COMMANDS[arguments.pop(0)] if arguments[0] in COMMANDS else val_command
    try:
        return command(arguments)
    except UserError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate: interrupted", file=sys.stderr)
        return 130


def val_command(argv: Sequence[str]) -> int:
    """Answer the val questions of a run."""
    import val_questions  # needs torch, which the other commands do not

    return val_questions.val_command(argv)


def run_command(argv: Sequence[str]) -> int:
    """Answer the questions of the benchmarks with a model."""
    import answer_benchmarks  # needs torch

    def score(folder: Path, names: Sequence[str]) -> None:
        print_scores(folder, score_folder(folder, ScoringOptions(), names, progress=_print_line))

    return answer_benchmarks.run_command(argv, os.environ, default_roots(), score)


def score_command(argv: Sequence[str]) -> int:
    """Score saved predictions."""
    parser = _parser("score", "Score the predictions of a folder and write FOLDER/scores.json.")
    add = parser.add_argument
    add("folder", type=Path, help="folder with predictions.jsonl, or with one folder for each benchmark")
    add("--benchmarks", default="", help=f"comma list (default: all that are there): {', '.join(BENCHMARKS)}")
    add("--rules", choices=[rules.value for rules in Rules], default=Rules.MAR2025.value,
        help="version of VLMEvalKit whose rules read the replies (default %(default)s)")  # fmt: skip
    add("--mmmu_parser", choices=MMMU_PARSERS, default="kit", help="how MMMU's replies are read (default %(default)s)")
    add("--judge", default="none", help="none; heuristic (offline word overlap, never the papers' metric); "
        "replay (only replies of --judge_cache); or the address of an OpenAI-compatible server")  # fmt: skip
    add("--judge_model", default="gpt-4-0613", help="model of the judge (default %(default)s, the papers')")
    add("--judge_prompts", type=Path, help="JSON file of the judge's prompts (default: this project's own)")
    add("--judge_cache", type=Path, help="file of the judge's replies (default: FOLDER/judge_replies.jsonl)")
    add(
        "--judge_key_variable", default="OPENAI_API_KEY", help="environment variable with the key (default %(default)s)"
    )
    add("--judge_timeout", type=float, default=60.0, help="seconds for one try of one request (default %(default)s)")
    add("--judge_retries", type=int, default=3, help="further tries of a failed request (default %(default)s)")
    add("--judge_workers", type=int, default=8, help="requests to the judge at a time (default %(default)s)")
    arguments = parser.parse_args(argv)
    prompts = load_prompts(arguments.judge_prompts) if arguments.judge_prompts else DEFAULT_PROMPTS
    judge = _judge(arguments, prompts.name)
    options = ScoringOptions(
        Rules(arguments.rules), arguments.mmmu_parser, judge, prompts, max(1, arguments.judge_workers)
    )
    names = [name.strip() for name in arguments.benchmarks.split(",") if name.strip()]
    print_scores(arguments.folder, score_folder(arguments.folder, options, names, progress=_print_line))
    return 0


def print_scores(folder: Path, scores: list[BenchmarkScore]) -> None:
    """Print scores with what they depend on."""
    conditions = conditions_table(scores)
    for row in conditions.rows:
        _print_line(f"{row[0]}: {format_value(row[1])}")
        pairs = zip(conditions.header[2:], row[2:], strict=True)
        _print_line("  " + "; ".join(f"{name}: {format_value(value)}" for name, value in pairs))
    for score in scores:
        for note in score.notes:
            _print_line(f"{score.benchmark}: {note}")
    _print_line(f"scores: {folder / 'scores.json'}")


def _judge(arguments: argparse.Namespace, prompts_name: str) -> Judge | None:
    cache = arguments.judge_cache or arguments.folder / "judge_replies.jsonl"
    if arguments.judge == "none":
        return None
    if arguments.judge == "heuristic":
        return HeuristicJudge()
    if arguments.judge == "replay":
        if not cache.exists():
            raise ConfigError(f"--judge replay needs the judge's replies, but {cache} does not exist (--judge_cache).")
        return CachedJudge(ReplayedJudge(f"{arguments.judge_model} ({prompts_name})"), cache)
    if not arguments.judge.startswith(("http://", "https://")):
        raise ConfigError(f"--judge {arguments.judge}: give none, heuristic, replay, or an address (https://...).")
    if arguments.judge_timeout <= 0 or arguments.judge_retries < 0:
        raise ConfigError("--judge_timeout must be positive and --judge_retries at least 0.")
    judge = ApiJudge(
        arguments.judge,
        arguments.judge_model,
        prompts_name=prompts_name,
        key=os.environ.get(arguments.judge_key_variable, ""),
        timeout=arguments.judge_timeout,
        retries=arguments.judge_retries,
    )
    return CachedJudge(judge, cache)


def report_command(argv: Sequence[str]) -> int:
    """Write the report of scored folders."""
    parser = _parser("report", "Write report.md, report.html and report.json: scores beside the papers' rows.")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with scores.json, one for each model")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first one)")
    parser.add_argument("--names", default="", help="comma list of the models' names (default: the folders')")
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.names.split(",")] if arguments.names else map(str, arguments.folders)
    names = list(names)
    if len(names) != len(arguments.folders) or len(set(names)) != len(names):
        raise ConfigError(f"--names {arguments.names!r} must be {len(arguments.folders)} different names.")
    scores = {name: load_scores(folder) for name, folder in zip(names, arguments.folders, strict=True)}
    _print_table(short_table(scores))
    for path in write_reports(arguments.out or arguments.folders[0], scores):
        _print_line(f"report: {path}")
    return 0


def export_command(argv: Sequence[str]) -> int:
    """Write predictions in the form of a public kit."""
    parser = _parser("export", "Write predictions as the files of VLMEvalKit or lmms-eval.")
    parser.add_argument("folder", type=Path, help="folder with predictions")
    parser.add_argument("--to", choices=("vlmevalkit", "lmms-eval"), required=True, help="whose files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--model", required=True, help="name of the model in the files")
    parser.add_argument(
        "--format", choices=FORMATS, default="xlsx", help="of VLMEvalKit's tables (default %(default)s)"
    )
    arguments = parser.parse_args(argv)
    predictions, now = folder_predictions(arguments.folder), datetime.now()
    if arguments.to == "vlmevalkit":
        exported = export_vlmevalkit(
            predictions, arguments.out, model=arguments.model, now=now, file_format=arguments.format
        )
    else:
        exported = export_lmms_eval(predictions, arguments.out, model=arguments.model, now=now)
    for line in (*map(str, exported.paths), *exported.notes):
        _print_line(line)
    return 0


def check_command(argv: Sequence[str]) -> int:
    """Read the benchmarks' files and say what is there; 1 where one is missing or damaged."""
    parser = _parser("check", "Read the files of the benchmarks: which are there, of which version. Downloads nothing.")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder with the files; may be repeated "
                        "(default: the environment variable LMUData, then data/benchmarks)")  # fmt: skip
    parser.add_argument("--benchmarks", default="", help=f"comma list (default: all): {', '.join(BENCHMARKS)}")
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.benchmarks.split(",") if name.strip()] or list(BENCHMARKS)
    num_failed = 0
    for name in names:
        try:
            found = load_questions(find_benchmark(name), arguments.data or default_roots())
        except UserError as error:
            num_failed += 1
            _print_line(f"{name}: {error}")
            continue
        _print_line(f"{name}: {len(found.questions):,} questions, {found.source}")
        for note in found.notes:
            _print_line(f"  {note}")
    return 1 if num_failed else 0


def default_roots() -> list[Path]:
    """Return where benchmarks' files are looked for if no folder is given."""
    kit = os.environ.get("LMUData", "")  # noqa: SIM112, VLMEvalKit's own spelling
    return [Path(kit)] * bool(kit) + [Path("data/benchmarks")]


def golden_command(argv: Sequence[str]) -> int:
    """Compare the scorers with recorded verdicts; 1 on any mismatch."""
    parser = _parser("golden", "Compare the scorers with recorded verdicts of public code, file by file.")
    parser.add_argument("folder", type=Path, help="folder with files as in tests/golden/evaluation")
    parser.add_argument("--show", type=int, default=5, help="mismatches to print for each file (default %(default)s)")
    arguments = parser.parse_args(argv)
    files = check_folder(arguments.folder)
    width = max(len(file.path.name) for file in files)
    for file in files:
        _print_line(f"{file.path.name:{width}}  {file.num_cases:5} cases  {len(file.mismatches):5} mismatches")
        for line in file.mismatches[: arguments.show]:
            _print_line(f"  {line}")
    for path in unknown_files(arguments.folder):
        _print_line(f"{path.name}: not checked, no scorer has this name")
    total, wrong = sum(file.num_cases for file in files), sum(len(file.mismatches) for file in files)
    _print_line(f"{'all':{width}}  {total:5} cases  {wrong:5} mismatches")
    return 1 if wrong or not total else 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"evaluate.py {command}", description=description, formatter_class=RAW)


def _print_line(line: str) -> None:
    console.print(line, soft_wrap=True)


def _print_table(found: ScoreTable) -> None:
    table = Table(*found.header, title=found.title)
    for row in found.rows:
        table.add_row(*(format_value(value) for value in row))
    console.print(table)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "val": val_command,
    "run": run_command,
    "score": score_command,
    "report": report_command,
    "export": export_command,
    "check": check_command,
    "golden": golden_command,
}


if __name__ == "__main__":
    sys.exit(main())
