"""Questions of a validation: which rank reads which, their greedy answers, and how many are correct."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aki_megatron.data.bad_samples import BadSample, BadSampleBudget, sample_errors
from aki_megatron.data.media import Decoders
from aki_megatron.data.template import Template
from aki_megatron.data.validation_set import ValidationSet
from aki_megatron.errors import DataError
from aki_megatron.evaluate.runner import read_prompt
from aki_megatron.evaluate.scores import Prediction
from aki_megatron.evaluate.staged_generation import GenerationSettings, NextTokens, continue_greedily
from aki_megatron.supervise.validations import Answer
from aki_megatron.types import Conversation, Sample


@dataclass
class AnswerCounts:
    """Answers to the questions of one source that this rank has read."""

    questions: int = 0
    correct: int = 0
    bad_samples: int = 0
    example: Answer | None = None
    """Of question 0."""


@dataclass(frozen=True)
class _Question:
    source: int
    number: int
    conversation: Conversation
    prompt: Sample


class ValidationQuestions:
    """The questions of one data rank: question n of a source is that of data rank n modulo their number."""

    def __init__(
        self,
        names: Sequence[str],
        settings: GenerationSettings,
        *,
        validation_set: ValidationSet | None,
        template: Template,
        decoders: Decoders,
        data_rank: int,
        data_size: int,
        max_prompt_positions: int,
    ) -> None:
        """
        names                 of the sources, on every rank
        validation_set        None on ranks that read no data
        max_prompt_positions  a question whose prompt is longer cannot be answered, and counts as a bad sample
        """
        self._names = names
        self._settings = settings
        self._set = validation_set
        self._template = template
        self._decoders = decoders
        self._data_rank = data_rank
        self._data_size = data_size
        self._max_prompt_positions = max_prompt_positions
        self._questions: list[_Question] | None = None
        self._bad = [0] * len(names)

    def answer(self, next_tokens: NextTokens, agree: Callable[[bool], bool | None]) -> list[AnswerCounts] | None:
        """Answer all questions; return the counts of each source. Collective; arguments as in continue_greedily.

        Returns None when ``agree`` did. Raises BadSampleBudgetExceeded where too many questions cannot be read.
        """
        if self._questions is None:
            self._questions = self._read()
        generated = continue_greedily(
            [question.prompt for question in self._questions],
            next_tokens,
            self._settings,
            reads_data=self._set is not None,
            agree=agree,
        )
        if generated is None:
            return None
        counts = [AnswerCounts(bad_samples=bad) for bad in self._bad]
        for question, tokens in zip(self._questions, generated, strict=True):
            prediction = self._prediction(question.conversation, tokens)
            own = counts[question.source]
            own.questions += 1
            own.correct += prediction.correct
            if question.number == 0:
                own.example = Answer(prediction.question, prediction.reference_answer, prediction.generated_answer)
        return counts

    def _prediction(self, conversation: Conversation, tokens: Sequence[int]) -> Prediction:
        turn = conversation.turns[-1]
        answer = self._template.tokenizer.decode(list(tokens)).strip()
        return Prediction(conversation.key, "", turn.prompt, turn.response, answer, [])

    def _read_prompt(self, conversation: Conversation) -> Sample:
        prompt = read_prompt(conversation, self._template, self._decoders)
        if len(prompt.token_ids) > self._max_prompt_positions:
            raise DataError(
                f"{conversation.key}: the prompt has {len(prompt.token_ids)} positions, which leaves no room for an "
                f"answer of validation.max_new_tokens={self._settings.max_new_tokens} within the decoder's positions."
            )
        return prompt

    def _read(self) -> list[_Question]:
        """Read and decode this rank's questions, once per start."""
        if self._set is None:
            return []
        budget = BadSampleBudget(self._set.config.data.max_bad_fraction)
        found: list[_Question] = []
        for source, name in enumerate(self._names):
            for number in range(self._data_rank, self._set.num_questions(name), self._data_size):
                try:
                    with sample_errors(f"question {number} of source {name}"):
                        conversation = self._set.question(name, number)
                        prompt = self._read_prompt(conversation)
                except DataError as error:
                    self._bad[source] += 1
                    budget.record(0, [BadSample(name, str(error))])
                else:
                    budget.record(1, [])
                    found.append(_Question(source, number, conversation, prompt))
        return found
