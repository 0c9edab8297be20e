"""Yes/no questions (MME, POPE): the answer read from each reply."""

from collections.abc import Sequence
from dataclasses import dataclass

from aki_megatron.evaluate.benchmarks.question import Prediction
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.extraction.yes_no import UNKNOWN, extract_yes_no

PARSER = "yes/no words"


@dataclass(frozen=True)
class YesNo:
    """A prediction with the answer read from it."""

    prediction: Prediction
    extracted: str

    @property
    def is_hit(self) -> bool:
        return self.extracted == self.prediction.question.answer

    @property
    def is_unknown(self) -> bool:
        return self.extracted == UNKNOWN


def read_answers(predictions: Sequence[Prediction], rules: Rules) -> list[YesNo]:
    """Read the answer of every reply."""
    return [YesNo(p, UNKNOWN if p.error else extract_yes_no(p.reply, rules)) for p in predictions]


def yes_or_no(text: str) -> str:
    """Return a reference answer as the kit writes it: parquet files hold "yes" as well as "Yes"."""
    return text.strip().capitalize()
