"""Ask a judge about many predictions at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from aki_megatron.evaluate.benchmarks.question import Prediction
from aki_megatron.evaluate.judges.judge import Judge, JudgeError, JudgeRequest, JudgeUnavailableError

T = TypeVar("T")


@dataclass(frozen=True)
class Judgement(Generic[T]):
    """What a judge's replies about one prediction come to.

    value    None where no reply was usable
    tries    replies used, the unusable ones included
    failure  why there is no value
    """

    value: T | None
    tries: int = 0
    failure: str = ""


def first_usable(replies: Sequence[str], read: Callable[[str], T | None]) -> Judgement[T]:
    """Return the first reply that ``read`` finds a value in."""
    for number, reply in enumerate(replies, start=1):
        value = read(reply)
        if value is not None:
            return Judgement(value, number)
    return Judgement(None, len(replies), "no usable reply")


def judge_one(judge: Judge, requests: Sequence[JudgeRequest], read: Callable[[str], T | None]) -> Judgement[T]:
    """Ask the requests, one after another, until ``read`` finds a value in a reply."""
    failure = ""
    for number, request in enumerate(requests, start=1):
        try:
            reply = judge.ask(request)
        except JudgeError as error:
            failure = str(error)
            continue
        value = read(reply)
        if value is not None:
            return Judgement(value, number)
        failure = f"unusable reply {reply[:80]!r}"
    return Judgement(None, len(requests), failure or "no request")


def judge_all(
    judge: Judge,
    predictions: Sequence[Prediction],
    requests: Callable[[Prediction], Sequence[JudgeRequest]],
    read: Callable[[str], T | None],
    *,
    workers: int,
) -> list[Judgement[T]]:
    """Judge every prediction, ``workers`` at a time.

    A question that could not be asked has no reply to judge. Raises JudgeUnavailableError where the judge cannot be
    used at all.
    """

    def judge_prediction(prediction: Prediction) -> Judgement[T]:
        if prediction.error:
            return Judgement(None, 0, f"not asked: {prediction.error}")
        return judge_one(judge, requests(prediction), read)

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(judge_prediction, prediction) for prediction in predictions]
        try:
            return [future.result() for future in futures]
        except JudgeUnavailableError:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
