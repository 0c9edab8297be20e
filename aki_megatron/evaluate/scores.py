"""Predictions and their accuracy per task, beside the majority-class baseline."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """A val question with its reference answer and the generated one."""

    key: str
    task: str
    question: str
    reference_answer: str
    generated_answer: str
    images: list[str]
    """Paths of the image files."""

    @property
    def correct(self) -> bool:
        """Exact match, ignoring case and surrounding white space."""
        return self.generated_answer.strip().lower() == self.reference_answer.strip().lower()


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one task, in percent."""

    task: str
    num_questions: int
    accuracy: float
    majority_baseline: float
    """Accuracy of always answering with the most frequent reference answer of the task."""
    majority_answer: str

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval of the accuracy (normal approximation), in points."""
        fraction = self.accuracy / 100
        return 196 * (fraction * (1 - fraction) / self.num_questions) ** 0.5


def score_by_task(predictions: Sequence[Prediction]) -> list[TaskScore]:
    """Return one score per task, in the order in which tasks first appear."""
    by_task: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_task[prediction.task].append(prediction)
    scores = []
    for task, group in by_task.items():
        majority_answer, count = Counter(prediction.reference_answer for prediction in group).most_common(1)[0]
        correct = sum(prediction.correct for prediction in group)
        scores.append(
            TaskScore(task, len(group), 100 * correct / len(group), 100 * count / len(group), majority_answer)
        )
    return scores
