"""Answer the held-out questions of a fine-tuned run and write the accuracies into its report.

    python tools/evaluate.py runs/demo/sft                     # every task, all held-out questions
    python tools/evaluate.py runs/demo/sft --per_task 100      # a quick look
    python tools/evaluate.py RUN --with_run PRETRAINING_RUN --report runs/demo/report.html

Reads config.yaml and the newest checkpoint of the run folder. Writes evaluation/answers.jsonl, evaluation/scores.json
and report.html there (or where --report says). Answers are greedy; a correct answer equals the gold one whole.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aki_megatron.attention import AttentionMask
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import load_saved
from aki_megatron.data.pipeline import build_template, build_tokenizer
from aki_megatron.data.sources import open_sources, with_split
from aki_megatron.data.template import Template
from aki_megatron.errors import ConfigError, DataError, UserError
from aki_megatron.evaluate.mask_picture import MaskPanel, draw_masks
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.evaluate.runner import answer_all, choose
from aki_megatron.evaluate.scores import Answer, TaskScore, score
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.supervise.run_paths import RunPaths, read_metrics
from aki_megatron.types import IGNORE, Conversation

console = Console(highlight=False)


def load_model(config: RunConfig, folder: Path) -> Stage:
    """The run's model with the weights of its newest checkpoint, on the GPU where there is one."""
    model = build_model(config.model, rule=config.attention.rule)
    load_weights(model, folder)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def mask_of(conversation: Conversation, template: Template, config: RunConfig) -> tuple[bytes, str]:
    """Picture of the mask of one training sample, and the sentence above it."""
    sample = template.render_conversation(conversation)
    if sample is None:
        raise DataError(f"{conversation.key} has nothing to learn")
    modality_ids = torch.tensor([sample.modality_ids], dtype=torch.int8)
    rule = config.attention.rule
    layout = AttentionMask.build(
        modality_ids,
        torch.zeros_like(modality_ids, dtype=torch.int32),
        rule=rule,
        scored=torch.tensor([sample.targets]) != IGNORE,
    )
    labels = [template.tokenizer.spelling(token).decode(errors="replace") for token in sample.token_ids]
    picture = draw_masks([MaskPanel(f"{rule}: {sample.key}", layout.dense()[0])], sample.modality_ids, labels)
    return (
        picture,
        f"Rule {rule}. Coloured: the row's token attends to the column's; strongly coloured: it looks ahead.",
    )


def record(folder: RunPaths) -> RunRecord:
    """What a report says of a run's training."""
    return RunRecord(folder.path.name, read_metrics(folder.metrics), folder.config.read_text())


def show(scores: list[TaskScore]) -> None:
    """Print the accuracies."""
    table = Table("task", "questions", "accuracy", "majority answer", title="held-out questions, greedy")
    for s in scores:
        table.add_row(
            s.task,
            f"{s.questions:,}",
            f"{s.accuracy:.1f} +- {s.half_width:.1f} %",
            f"{s.majority:.1f} % ({s.majority_answer})",
        )
    console.print(table)


def evaluate(arguments: argparse.Namespace) -> None:
    """Answer, score, write."""
    folder = RunPaths(arguments.run)
    if not folder.config.exists():
        raise ConfigError(f"{folder.config} does not exist: {arguments.run} is not a run folder.")
    config = load_saved(folder.config)
    if config.data.kind != "conversations":
        raise ConfigError(
            f"{arguments.run} was trained on {config.data.kind}; questions need a fine-tuned run (kind conversations)."
        )
    template = build_template(config, build_tokenizer(config))
    trained = [source.name for source in config.data.sources]
    held_out = with_split(trained, "val")
    if not held_out:
        raise ConfigError(f"None of the sources {trained} of {arguments.run} has a val split to be asked about.")
    sources = open_sources(config.data.root, held_out, "val")
    questions = choose(sources, arguments.per_task)
    model = load_model(config, folder.path)
    with Progress(console=console) as bar:
        task = bar.add_task("answering", total=len(questions))
        answers: list[Answer] = list(
            answer_all(model, template, questions, progress=lambda done: bar.update(task, completed=done))
        )
    scores = score(answers)
    out = folder.path / "evaluation"
    out.mkdir(exist_ok=True)
    (out / "answers.jsonl").write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
    (out / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")
    show(scores)
    runs = [record(RunPaths(path)) for path in arguments.with_run] + [record(folder)]
    report = arguments.report or folder.report
    mask = mask_of(questions[0], template, config)
    write_report(report, f"AKI: {arguments.run}", runs, scores=scores, answers=answers, mask=mask)
    console.print(f"report: [bold]{report}[/bold]")


def main() -> int:
    """Parse and evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("--per_task", type=int, default=0, help="questions per task (default 0: all)")
    parser.add_argument("--with_run", type=Path, action="append", default=[], help="another run whose curves to show")
    parser.add_argument(
        "--report", type=Path, help="where to write the report (default: report.html in the run folder)"
    )
    try:
        evaluate(parser.parse_args())
    except UserError as error:
        console.print(f"[red]error:[/red] {error}", style="default")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
