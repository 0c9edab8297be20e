"""The questions that are measured: of benchmarks' files, of a folder of predictions, or of a run's val splits.

A set maps a name to functions that return its conversations; a function reads its image when it is called.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.sources import task_of
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.evaluate.benchmark_conversation import to_conversation
from aki_megatron.evaluate.benchmark_folder import QuestionsInfo, folder_predictions
from aki_megatron.evaluate.benchmarks.benchmark import Benchmark
from aki_megatron.evaluate.benchmarks.files import load_questions
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS, find_benchmark
from aki_megatron.evaluate.prompts import PROFILES, PromptProfile
from aki_megatron.evaluate.runner import select_questions
from aki_megatron.types import Conversation

QuestionSets = dict[str, list[Callable[[], Conversation]]]

Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` items, evenly spaced by number; all of them for 0 or where there are no more."""
    count = min(count or len(items), len(items))
    return [items[number * len(items) // count] for number in range(count)]


def find_profile(name: str) -> PromptProfile:
    """Return a prompt profile. Raises ConfigError for an unknown one."""
    if name not in PROFILES:
        raise ConfigError(f"There is no prompt profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]


def benchmark_questions(
    names: Sequence[str],
    roots: Sequence[Path],
    profile: PromptProfile,
    samples: int,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[QuestionSets, list[str]]:
    """Return questions of benchmarks, and where they are from.

    names    of benchmarks
    samples  most of each, evenly spaced; 0: all

    Raises DataError where a benchmark's files are not in ``roots``.
    """
    sets: QuestionSets = {}
    sources: list[str] = []
    for benchmark in dict.fromkeys(find_benchmark(name).name for name in names):
        found = load_questions(BENCHMARKS[benchmark], roots, progress)
        sets[benchmark] = [partial(to_conversation, question, profile) for question in spread(found.questions, samples)]
        sources.append(f"{benchmark}: {found.source}")
    return sets, sources


def predicted_questions(
    folder: Path,
    names: Sequence[str],
    roots: Sequence[Path],
    profile: PromptProfile | None,
    samples: int,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[QuestionSets, list[str]]:
    """Return the questions that a folder of predictions answers, as they were asked, and where they are from.

    names    benchmarks of the folder; none: all
    profile  None: the one that the predictions name

    Images are not saved with predictions, so the benchmarks' files must be in ``roots``. Raises DataError where they
    are not, where a question is not among them, and where the folder does not name one known profile.
    """
    predictions = folder_predictions(folder)
    wanted = [find_benchmark(name).name for name in names] or list(predictions)
    if missing := [name for name in wanted if name not in predictions]:
        raise DataError(f"{folder} has no predictions on {', '.join(missing)}; it has {', '.join(predictions)}.")
    sets: QuestionSets = {}
    sources: list[str] = []
    for name in wanted:
        benchmark: Benchmark = BENCHMARKS[name]
        asked_as = {each.profile for each in predictions[name]} - {""}
        info = QuestionsInfo.load(folder, name)
        asked_as |= {info.profile} - {""} if info else set()
        if profile is None and (len(asked_as) != 1 or not asked_as <= set(PROFILES)):
            raise DataError(
                f"{folder}: the predictions on {name} name the prompt profiles {sorted(asked_as) or 'none'}; say which "
                f"one to use: --profile {' or '.join(PROFILES)}."
            )
        used = profile or PROFILES[next(iter(asked_as))]
        found = load_questions(benchmark, roots, progress)
        by_id = {question.id: question for question in found.questions}
        ids = [each.question.id for each in predictions[name]]
        if unknown := [each for each in ids if each not in by_id]:
            raise DataError(f"{folder}: question {unknown[0]} of {name} is not in {found.source}; give its file.")
        sets[name] = [partial(to_conversation, by_id[each], used) for each in spread(ids, samples)]
        sources.append(f"{name}: {found.source}, prompts {used.name}")
    return sets, sources


def val_questions(
    sources: Mapping[str, Sequence[Conversation]], samples: int, bad_samples: BadSampleBudget
) -> QuestionSets:
    """Return val questions by task, at most ``samples`` of each, evenly spaced.

    Raises BadSampleBudgetExceeded when too many cannot be read.
    """
    sets: QuestionSets = defaultdict(list)
    for conversation in select_questions(sources, samples, bad_samples):
        sets[task_of(conversation.key)].append(partial(_itself, conversation))
    return dict(sets)


def _itself(conversation: Conversation) -> Conversation:
    return conversation
