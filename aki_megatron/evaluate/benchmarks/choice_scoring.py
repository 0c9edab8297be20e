"""Choice questions: the letter read from each reply, and accuracies by category."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aki_megatron.evaluate.benchmarks.question import Prediction
from aki_megatron.evaluate.benchmarks.score import ScoreTable, percent
from aki_megatron.evaluate.extraction.choice import NONE_OF_THEM, extract_choice
from aki_megatron.evaluate.extraction.rules import Rules

PARSER = "option letter, then option text"

Accuracies = dict[str, float | None]
"""Percent by name; None where a name has no question."""


@dataclass(frozen=True)
class Choice:
    """A prediction with the option read from it.

    answer     letter of the right option
    extracted  letter, "Z" for none of the options, None where the rule is undecided
    """

    prediction: Prediction
    answer: str
    extracted: str | None

    @property
    def is_hit(self) -> bool:
        # the kit takes what is undecided for none of the options
        return not self.prediction.error and (self.extracted or NONE_OF_THEM) == self.answer

    @property
    def is_undecided(self) -> bool:
        return self.extracted is None


def read_choice(
    prediction: Prediction, rules: Rules, *, choices: Mapping[str, str] | None = None, answer: str | None = None
) -> Choice:
    """Read the option of a reply; ``choices`` and ``answer`` replace those of the question."""
    question = prediction.question
    choices = question.choices if choices is None else choices
    extracted = None if prediction.error else extract_choice(prediction.reply, choices, rules)
    return Choice(prediction, question.answer if answer is None else answer, extracted)


def read_choices(predictions: Sequence[Prediction], rules: Rules) -> list[Choice]:
    """Read the option of every reply."""
    return [read_choice(prediction, rules) for prediction in predictions]


def accuracies(
    choices: Sequence[Choice], l2_name: Callable[[str], str] = str, among: Sequence[Choice] | None = None
) -> Accuracies:
    """Return the percentage of hits: Overall, of each second-level category, of each category.

    l2_name  the name that a second-level category is printed by; a category of the same name replaces it, as in the
             kit's tables
    among    what the categories are read from, if there are more than those of ``choices``
    """
    found: Accuracies = {"Overall": percent([choice.is_hit for choice in choices])}
    for name, of in (("l2_category", l2_name), ("category", str)):
        groups = sorted({getattr(choice.prediction.question, name) for choice in among or choices} - {""})
        for group in groups:
            hits = [choice.is_hit for choice in choices if getattr(choice.prediction.question, name) == group]
            found[of(group)] = percent(hits)
    return found


def accuracy_table(title: str, columns: Mapping[str, Accuracies]) -> ScoreTable:
    """Return a table of accuracies, one column for each name of ``columns``."""
    names = dict.fromkeys(name for found in columns.values() for name in found)
    rows = tuple((name, *(found.get(name) for found in columns.values())) for name in names)
    return ScoreTable(title, ("category", *columns), rows)
