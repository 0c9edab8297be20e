"""Answers and their accuracy per task, beside the answer a model without eyes would give."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A held-out question with its gold and its generated answer."""

    key: str
    task: str
    question: str
    gold: str
    given: str
    image: str | None
    """Path of the picture."""

    @property
    def correct(self) -> bool:
        """Exact match, letter case and outer white space aside."""
        return self.given.strip().lower() == self.gold.strip().lower()


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one task, in percent."""

    task: str
    questions: int
    accuracy: float
    majority: float
    """Accuracy of always giving the most frequent gold answer of the task."""
    majority_answer: str

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the accuracy (normal approximation), in points."""
        share = self.accuracy / 100
        return 196 * (share * (1 - share) / self.questions) ** 0.5


def score(answers: Sequence[Answer]) -> list[TaskScore]:
    """One score per task, in the order in which tasks first appear."""
    by_task: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_task[answer.task].append(answer)
    scores = []
    for task, group in by_task.items():
        majority_answer, count = Counter(answer.gold for answer in group).most_common(1)[0]
        correct = sum(answer.correct for answer in group)
        scores.append(
            TaskScore(task, len(group), 100 * correct / len(group), 100 * count / len(group), majority_answer)
        )
    return scores
