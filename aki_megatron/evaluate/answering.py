"""Answer requests as text: a queue of prompts that join the running batch as soon as others have ended.

The batch is decoded one token at a time; a sequence that has ended gives its place to the next prompt at once, so short
answers never wait for long ones. Tokens do not depend on what else is in the batch.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from aki_megatron.data.collate import collate
from aki_megatron.errors import DataError
from aki_megatron.evaluate.decoding import Decoder
from aki_megatron.evaluate.sampling import GREEDY, Sampling, TokenChooser
from aki_megatron.model.stage import Stage
from aki_megatron.types import Sample

REPLACEMENT = "\ufffd"
"""What decoding writes for bytes that are a part of a character."""

FinishReason = Literal["stop", "length", "cancelled"]


class TextDecoder(Protocol):
    """What answering needs of a tokenizer."""

    @property
    def pad_id(self) -> int:
        """Token of padding."""
        ...

    @property
    def stop_ids(self) -> Collection[int]:
        """Tokens that end an answer."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens left out."""
        ...


@dataclass
class Request:
    """A prompt (Template.render_prompt, its media decoded) and how it is continued; filled in while it runs.

    number          with the seed of ``sampling`` it decides the draws
    max_new_tokens  the answer ends at this many tokens
    stop_texts      or before the first of these texts
    on_text         gets every new piece of the answer; a piece that may be the beginning of a stop text is held back
    is_cancelled    set it, from any thread, and the request ends before the next token
    """

    prompt: Sample
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    number: int = 0
    stop_texts: tuple[str, ...] = ()
    on_text: Callable[[str], None] | None = None
    is_cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    _sent: int = 0

    def __post_init__(self) -> None:
        self._chooser = TokenChooser(self.sampling, self.number)

    def choose(self, logits: Tensor) -> int:
        """Return the next token from logits [V]."""
        return self._chooser.choose(logits)

    def take(self, token: int, decoder: TextDecoder) -> bool:
        """Add the next token to the answer; return whether the answer has ended."""
        if token in decoder.stop_ids:
            return self._finish("stop", decoder.decode(self.tokens))
        self.tokens.append(token)
        text = decoder.decode(self.tokens)
        ends = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        if ends:
            return self._finish("stop", text[: min(ends)])
        if len(self.tokens) >= self.max_new_tokens:
            return self._finish("length", text)
        self.text = text
        if self.on_text is not None:
            self._send(text[: len(text) - self._held_back(text)])
        return False

    def _finish(self, reason: FinishReason, text: str) -> bool:
        self.text, self.finish_reason = text, reason
        self._send(text)
        return True

    def _send(self, text: str) -> None:
        if self.on_text is not None and len(text) > self._sent:
            self.on_text(text[self._sent :])
            self._sent = len(text)

    def _held_back(self, text: str) -> int:
        """Return how many characters at the end of a text may change or be the beginning of a stop text."""
        broken = len(text) - len(text.rstrip(REPLACEMENT))
        begun = (size for stop in self.stop_texts for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max([broken, *begun])


class Answerer:
    """Continue requests with one model; not safe to call from several threads."""

    def __init__(
        self,
        stage: Stage,
        decoder: TextDecoder,
        *,
        max_sequences: int = 16,
        max_prefill_tokens: int = 8192,
    ) -> None:
        """Decode up to ``max_sequences`` requests at a time.

        max_prefill_tokens  padded positions of the prompts that are read in one pass
        """
        assert max_sequences >= 1, max_sequences
        self.stage = stage
        self.waiting: deque[Request] = deque()
        self._text_decoder = decoder
        self._max_sequences = max_sequences
        self._max_prefill_tokens = max_prefill_tokens
        self._batch = Decoder(stage)
        self._running: list[Request] = []

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not self._running

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def max_sequences(self) -> int:
        """Most requests that run at a time."""
        return self._max_sequences

    def submit(self, request: Request) -> None:
        """Queue a request. Raises DataError for a prompt and an answer that the model has no positions for."""
        limit = self.stage.config.decoder.rope.max_position_embeddings
        needed = len(request.prompt.token_ids) + request.max_new_tokens
        if needed > limit:
            raise DataError(
                f"Prompt {request.prompt.key} takes {len(request.prompt.token_ids)} positions and its answer up to "
                f"{request.max_new_tokens}: more than the {limit} of the model. Shorten it, or lower max_new_tokens."
            )
        self.waiting.append(request)

    def step(self) -> list[Request]:
        """Admit what fits and decode one token of every running request; return the requests that have ended."""
        ended = self._leave(self._cancelled())
        ended += self._admit()
        if self._running:
            logits = self._batch.step([request.tokens[-1] for request in self._running])
            ended += self._leave(self._take(self._running, logits))
        return ended

    def answer(self, requests: Iterable[Request], *, on_done: Callable[[Request], None] | None = None) -> None:
        """Queue all requests and run until they have ended."""
        for request in requests:
            self.submit(request)
        while not self.is_idle:
            for request in self.step():
                if on_done is not None:
                    on_done(request)

    def _admit(self) -> list[Request]:
        """Read the prompts of waiting requests, in their order, until the batch is full; return those ended at once."""
        ended: list[Request] = []
        while self.waiting and len(self._running) < self._max_sequences:
            group = self._next_group(ended)
            if not group:
                continue
            batch = collate(
                [[request.prompt] for request in group],
                pad_id=self._text_decoder.pad_id,
                image_size=self.stage.config.vision.image_size,
            )
            first = len(self._running)
            logits = self._batch.admit(batch)
            self._running += group
            ended += self._leave([first + number for number in self._take(group, logits)])
        return ended

    def _next_group(self, ended: list[Request]) -> list[Request]:
        """Take waiting requests as long as their prompts fit into one pass; one always does.

        Those that want no token any more are appended to ``ended``.
        """
        group: list[Request] = []
        longest = 0
        while self.waiting and len(self._running) + len(group) < self._max_sequences:
            request = self.waiting[0]
            longest = max(longest, len(request.prompt.token_ids))
            if group and longest * (len(group) + 1) > self._max_prefill_tokens:
                break
            self.waiting.popleft()
            if request.is_cancelled or request.max_new_tokens < 1:
                request.finish_reason = "cancelled" if request.is_cancelled else "length"
                ended.append(request)
            else:
                group.append(request)
        return group

    def _take(self, requests: Sequence[Request], logits: Tensor) -> list[int]:
        """Give each request its next token; return the numbers of those that have ended."""
        greedy = logits.argmax(dim=-1).tolist()
        ended = []
        for number, request in enumerate(requests):
            token = greedy[number]
            if request.sampling.temperature > 0.0:
                token = request.choose(logits[number])
            if request.take(token, self._text_decoder):
                ended.append(number)
        return ended

    def _cancelled(self) -> list[int]:
        found = [number for number, request in enumerate(self._running) if request.is_cancelled]
        for number in found:
            self._running[number].finish_reason = "cancelled"
        return found

    def _leave(self, numbers: list[int]) -> list[Request]:
        """Take requests out of the batch and return them."""
        ended = [self._running[number] for number in numbers]
        self._batch.remove(numbers)
        for number in sorted(numbers, reverse=True):
            self._running[number] = self._running[-1]
            del self._running[-1]
        return ended
