"""Answer the val questions of a fine-tuned run and write the accuracies into its report (tools/evaluate.py val).

    python tools/evaluate.py runs/demo/sft                     # every task, all val questions
    python tools/evaluate.py runs/demo/sft --per_task 100      # at most 100 questions per task
    python tools/evaluate.py RUN --with_run PRETRAINING_RUN --report runs/demo/report.html
    python tools/evaluate.py runs/lora --base /models/pretrain # what its checkpoints leave out has moved
    python tools/evaluate.py runs/own --source '{name: asked, format: llava, path: questions.jsonl, images: pictures}'

Files of one's own have no val split: --source names the questions, as an entry of data.sources does; of a conversation
the last question is answered.

Reads config.yaml and the newest checkpoint of the run folder. Writes evaluation/predictions.jsonl,
evaluation/scores.json and report.html there (or where --report says). Decoding is greedy; an answer is correct if it
equals the whole reference answer.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from aki_megatron.attention import AttentionMask
from aki_megatron.checkpoint.base_weights import BASE_HELP, NO_BASE_PATHS, BasePaths, read_base_paths
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.config.datasets import DATASET_FORMAT
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import load_saved
from aki_megatron.console import Console, Table, progress_bar
from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.pipeline import build_template, build_tokenizer, image_options
from aki_megatron.data.run_sources import open_conversations
from aki_megatron.data.sources import open_sources, with_split
from aki_megatron.data.template import Template
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.evaluate.mask_figure import MaskPanel, draw_masks
from aki_megatron.evaluate.run_report import RunRecord, write_report
from aki_megatron.evaluate.runner import predict, select_questions
from aki_megatron.evaluate.scores import TaskScore, score_by_task
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.validations import read_validations
from aki_megatron.train.evaluations import read_evaluations
from aki_megatron.types import IGNORE, Conversation

console = Console()


def load_model(config: RunConfig, folder: Path, base_paths: BasePaths = NO_BASE_PATHS) -> Stage:
    """Build the run's model with the weights of its newest checkpoint, on the GPU where there is one."""
    model = build_model(config.model, attention=config.attention)
    load_weights(model, folder, base_paths)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def plot_mask(conversation: Conversation, template: Template, config: RunConfig) -> tuple[bytes, str]:
    """Return a PNG of the attention mask of one training sample, and the sentence above it."""
    sample = template.render_conversation(conversation)
    if sample is None:
        raise DataError(f"{conversation.key}: no token of a response lies within data.max_text_tokens.")
    modality_ids = torch.tensor([sample.modality_ids], dtype=torch.int8)
    rule = config.attention.rule
    mask = AttentionMask.build(
        modality_ids,
        torch.zeros_like(modality_ids, dtype=torch.int32),
        config.attention,
        supervised=torch.tensor([sample.targets]) != IGNORE,
        image_tokens=config.model.resampler.num_latents,
    )
    labels = [template.tokenizer.token_bytes(token).decode(errors="replace") for token in sample.token_ids]
    image = draw_masks([MaskPanel(f"{rule}: {sample.key}", mask.dense()[0])], sample.modality_ids, labels)
    return image, f"Rule {rule}. Coloured: the row's token attends to the column's; strongly coloured: a later token."


def load_record(paths: RunPaths) -> RunRecord:
    """Read what a report shows of a run's training."""
    evaluations = [evaluation.to_dict() for evaluation in read_evaluations(paths)]
    return RunRecord.load(paths.config, read_metrics(paths.metrics), read_validations(paths.validation), evaluations)


def print_scores(scores: list[TaskScore]) -> None:
    """Print the accuracies as a table."""
    table = Table("task", "questions", "val accuracy", "majority-class baseline", title="val accuracy, greedy decoding")
    for s in scores:
        table.add_row(
            s.task,
            f"{s.num_questions:,}",
            f"{s.accuracy:.1f} +- {s.margin:.1f} %",
            f"{s.majority_baseline:.1f} % ({s.majority_answer})",
        )
    console.print(table)


def config_with_source(config_file: Path, source: str) -> RunConfig:
    """Return a run with the one source that ``source`` describes in YAML. Raises ConfigError for a wrong one."""
    flags = ["--config", str(config_file), "--data.sources", f"[{source}]", "--data.phases", "[]"]
    config = load_run(flags, default_config=config_file, prog="tools/evaluate.py", description="")
    if any(entry.format == DATASET_FORMAT for entry in config.data.sources):
        raise ConfigError("--source is for files of your own: give a format (llava, messages, parquet) and a path.")
    return config


def open_questions(config: RunConfig, config_file: Path, source: str | None) -> Mapping[str, Sequence[Conversation]]:
    """Open the questions by source: the val splits of the run's datasets, or the one that ``source`` describes."""

    def report(line: str) -> None:
        console.print(line, soft_wrap=True)

    if source is not None:
        opened = open_conversations(config_with_source(config_file, source).data, report)
        return {name: found.items for name, found in opened.items()}  # type: ignore[misc]
    names = [source.name for source in config.data.sources if source.format == DATASET_FORMAT]
    val_names = with_split(names, "val")
    if not val_names:
        raise ConfigError(
            f"None of the sources {[source.name for source in config.data.sources]} of {config_file.parent} has a val "
            "split to evaluate on; name questions of your own with --source '{name: asked, format: llava, path: "
            "questions.jsonl}'."
        )
    return open_sources(
        config.data.root, val_names, "val", max_bad_fraction=config.data.max_bad_fraction, progress=report
    )


def evaluate(
    run: Path,
    *,
    per_task: int,
    other_runs: list[Path],
    report: Path | None,
    source: str | None = None,
    max_new_tokens: int = 16,
    base_paths: BasePaths = NO_BASE_PATHS,
) -> None:
    """Answer the val questions of ``run``, or those of ``source``; score the answers and write the report."""
    paths = RunPaths(run)
    if not paths.config.exists():
        raise ConfigError(f"{paths.config} does not exist: {run} is not a run folder.")
    config = load_saved(paths.config)
    if config.data.kind != "conversations":
        raise ConfigError(f"{run} was trained on {config.data.kind}; give a fine-tuned run (data.kind conversations).")
    template = build_template(config, build_tokenizer(config))
    bad_samples = BadSampleBudget(config.data.max_bad_fraction)
    questions = select_questions(open_questions(config, paths.config, source), per_task, bad_samples)
    model = load_model(config, paths.path, base_paths)
    with progress_bar("answering", console=console) as bar:
        task = bar.add_task("questions", total=len(questions))
        answers = predict(
            model,
            template,
            questions,
            bad_samples=bad_samples,
            max_new_tokens=max_new_tokens,
            image_options=image_options(config.data),
            progress=lambda done: bar.update(task, completed=done),
        )
        predictions = list(answers)
    if bad_samples.counts:
        console.print(f"left out: {bad_samples.summary()}", soft_wrap=True)
    if not predictions:
        raise DataError("No question could be read:\n  " + "\n  ".join(bad_samples.first_reasons))
    scores = score_by_task(predictions)
    out = paths.path / "evaluation"
    out.mkdir(exist_ok=True)
    (out / "predictions.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in predictions))
    (out / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")
    print_scores(scores)
    records = [load_record(RunPaths(other)) for other in other_runs] + [load_record(paths)]
    report = report or paths.report
    answered = next(question for question in questions if question.key == predictions[0].key)
    mask = plot_mask(answered, template, config)
    write_report(report, f"AKI: {run}", records, scores=scores, predictions=predictions, mask=mask)
    console.print(f"report: {report}")


def val_command(argv: Sequence[str]) -> int:
    """Evaluate a run on its val questions; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py val", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("--per_task", type=int, default=0, help="most questions per task (default 0: all)")
    parser.add_argument("--with_run", type=Path, action="append", default=[], help="another run whose curves to show")
    parser.add_argument("--source", help="questions in files of one's own, as an entry of data.sources in YAML")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="longest answer (default %(default)s)")
    parser.add_argument("--report", type=Path, help="report file to write (default: report.html in the run folder)")
    parser.add_argument("--base", action="append", default=[], metavar="[KEY=]PATH", help=BASE_HELP)
    arguments = parser.parse_args(argv)
    evaluate(
        arguments.run,
        per_task=arguments.per_task,
        other_runs=arguments.with_run,
        report=arguments.report,
        source=arguments.source,
        max_new_tokens=arguments.max_new_tokens,
        base_paths=read_base_paths(arguments.base),
    )
    return 0
