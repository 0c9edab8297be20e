"""What a judge is: it answers prompts about a reply to a question."""

from dataclasses import dataclass
from typing import Protocol

from aki_megatron.errors import UserError
from aki_megatron.evaluate.benchmarks.question import Prediction


class JudgeError(Exception):
    """One request has no usable answer: a timeout, garbage, a refusal of the server. Scoring counts it."""


class JudgeUnavailableError(UserError):
    """No request can succeed: a wrong key or address, or many failures one after another."""


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    prediction  the question and the model's reply; what an offline judge reads
    prompt      what a language model is sent
    attempt     number of this try, from 0; each has a temperature of its own
    """

    prediction: Prediction
    prompt: str
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 512
    attempt: int = 0


class Judge(Protocol):
    """Answers requests, several at a time."""

    @property
    def name(self) -> str:
        """As printed beside every score."""

    @property
    def is_heuristic(self) -> bool:
        """Whether it is an offline rule, whose scores are never the papers' metric."""

    def ask(self, request: JudgeRequest) -> str:
        """Return the reply. Raises JudgeError for this request, JudgeUnavailableError for all."""
