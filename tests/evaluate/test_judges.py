"""Judges: a server that times out, returns garbage, refuses; the cache of replies; the offline heuristic."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aki_megatron.errors import ConfigError, DataError
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.judges.api import ApiJudge
from aki_megatron.evaluate.judges.cache import CachedJudge, ReplayedJudge
from aki_megatron.evaluate.judges.heuristic import HeuristicJudge
from aki_megatron.evaluate.judges.judge import JudgeError, JudgeRequest, JudgeUnavailableError
from aki_megatron.evaluate.judges.judging import judge_all
from aki_megatron.evaluate.judges.prompts import DEFAULT_PROMPTS, load_prompts

Answer = tuple[int, bytes]


def completion(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@contextmanager
def server(answers: Callable[[int], Answer]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint; ``answers`` gives status and body of the n-th request. Yields its address and the requests."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, content = answers(len(received))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            is_slow = content.startswith(b"slow")
            size = 5 if is_slow else max(1, len(content))
            for start in range(0, len(content), size):
                self.wfile.write(content[start : start + size])
                self.wfile.flush()
                time.sleep(0.15 * is_slow)

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a client that has gone
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1", received
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def judge(url: str, **options: Any) -> ApiJudge:
    defaults = {"prompts_name": "prompts p", "key": "secret", "retries": 2, "retry_seconds": 0.0, "timeout": 5.0}
    return ApiJudge(url, "m", **{**defaults, **options})


def prediction(benchmark: str = "MM-Vet", answer: str = "2<AND>7", reply: str = "x is 7", **details: str) -> Prediction:
    return Prediction(BenchmarkQuestion(benchmark, "1", "q", answer, details=details), reply)


REQUEST = JudgeRequest(prediction(), "grade this", "be fair", temperature=0.5, max_tokens=8)


def test_a_request_carries_model_prompt_and_key() -> None:
    with server(lambda number: (200, completion("0.5"))) as (url, received):
        asked = judge(url + "/")
        assert asked.ask(REQUEST) == "0.5"
    assert asked.name == "m (prompts p)" and not asked.is_heuristic
    assert received == [
        {
            "path": "/v1/chat/completions",
            "key": "Bearer secret",
            "model": "m",
            "messages": [{"role": "system", "content": "be fair"}, {"role": "user", "content": "grade this"}],
            "temperature": 0.5,
            "max_tokens": 8,
        }
    ]


@pytest.mark.parametrize(
    "first",
    [
        (503, b""),
        (429, b""),
        (200, b"not JSON"),
        (200, b"{}"),
        (200, completion(None)),
        (200, b"["),
        (200, b"[" * 99999),
    ],
)
def test_a_passing_fault_is_tried_again(first: Answer) -> None:
    with server(lambda number: first if number == 1 else (200, completion("0.5"))) as (url, received):
        assert judge(url).ask(REQUEST) == "0.5"
    assert len(received) == 2


def test_garbage_for_ever_fails_after_the_retries() -> None:
    failure = pytest.raises(JudgeError, match="no chat completion: b'garbage'")
    with server(lambda number: (200, b"garbage")) as (url, received), failure:
        judge(url).ask(REQUEST)
    assert len(received) == 3


def test_a_request_that_is_refused_is_not_tried_again() -> None:
    for status in (400, 302):
        failure = pytest.raises(JudgeError, match=f"status {status}")
        with server(lambda number, status=status: (status, b"")) as (url, received), failure:
            judge(url).ask(REQUEST)
        assert len(received) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_ends_the_scoring_at_once(status: int) -> None:
    failure = pytest.raises(JudgeUnavailableError, match=f"answers {status}: .*--judge_model")
    with server(lambda number: (status, b"")) as (url, received), failure:
        judge(url).ask(REQUEST)
    assert len(received) == 1


def test_an_answer_that_comes_too_slowly_or_not_at_all_fails() -> None:
    with server(lambda number: (200, b"slow " * 10)) as (url, _):
        for timeout in (0.1, 0.4):  # before the first byte, and before the last
            with pytest.raises(JudgeError, match="(?i)time"):
                judge(url, timeout=timeout, retries=0).ask(REQUEST)
    with pytest.raises(JudgeError, match="refused"):
        judge("http://127.0.0.1:9/v1", retries=0).ask(REQUEST)


def test_many_failures_one_after_another_end_the_scoring() -> None:
    with server(lambda number: (200, completion("0.5") if number == 2 else b"garbage")) as (url, _):
        asked = judge(url, retries=0, max_consecutive_failures=2)
        with pytest.raises(JudgeError):
            asked.ask(REQUEST)
        assert asked.ask(REQUEST) == "0.5"  # begins the count anew
        with pytest.raises(JudgeError):
            asked.ask(REQUEST)
        with pytest.raises(JudgeUnavailableError, match="failed 2 times one after another"):
            asked.ask(REQUEST)
        with pytest.raises(JudgeUnavailableError):
            judge_all(asked, [prediction()] * 9, lambda p: [REQUEST], str, workers=2)


def test_no_message_holds_the_key() -> None:
    for answer in ((401, b""), (400, b""), (200, b"garbage")):
        failure = pytest.raises((JudgeError, JudgeUnavailableError))
        with server(lambda number, answer=answer: answer) as (url, _), failure as caught:
            judge(url).ask(REQUEST)
        assert "secret" not in str(caught.value)


class Scripted:
    """A judge that replies by a script; an exception in it is raised."""

    name, is_heuristic = "scripted", False

    def __init__(self, *replies: str | Exception) -> None:
        self.replies = list(replies)

    def ask(self, request: JudgeRequest) -> str:
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def test_replies_are_replayed_and_failures_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "new/replies.jsonl"
    first = CachedJudge(Scripted(JudgeError("late"), "0.5"), path)
    with pytest.raises(JudgeError):
        first.ask(REQUEST)
    assert first.ask(REQUEST) == first.ask(REQUEST) == "0.5"
    second = CachedJudge(ReplayedJudge("scripted"), path)
    assert second.ask(REQUEST) == "0.5" and second.num_replayed == 1
    for other in (JudgeRequest(prediction(), "other"), JudgeRequest(prediction(), "grade this", "be fair", 1.0, 8)):
        with pytest.raises(JudgeError, match="not in the cache"):
            second.ask(other)
    with pytest.raises(JudgeError):  # another judge's replies are not this one's
        CachedJudge(ReplayedJudge("gpt-4"), path).ask(REQUEST)


def test_a_cache_cut_short_is_used_and_continued_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    CachedJudge(Scripted("0.5"), path).ask(REQUEST)
    whole = path.read_text()
    path.write_text(whole + '{"key": "ab')
    later = JudgeRequest(prediction(), "later")
    assert CachedJudge(Scripted("0.7"), path).ask(later) == "0.7"
    again = CachedJudge(ReplayedJudge("scripted"), path)
    assert (again.ask(REQUEST), again.ask(later)) == ("0.5", "0.7")
    path.write_text('{"key": 3}\n')
    with pytest.raises(DataError, match="replies.jsonl:1 is no cached reply"):
        CachedJudge(Scripted(), path)


def test_judging_counts_what_is_not_usable() -> None:
    asked = Scripted("rubbish", JudgeError("late"), "0.5")
    requests = [REQUEST] * 3
    found = judge_all(asked, [prediction()], lambda p: requests, lambda r: float(r) if r[0] == "0" else None, workers=1)
    assert (found[0].value, found[0].tries) == (0.5, 3)
    lost = judge_all(Scripted("", "?"), [prediction()], lambda p: requests[:2], lambda r: None, workers=1)
    assert lost[0].value is None and "'?'" in lost[0].failure
    broken = Prediction(prediction().question, "", error="no image")
    assert judge_all(Scripted(), [broken], lambda p: requests, str, workers=1)[0].failure == "not asked: no image"


@pytest.mark.parametrize(
    ("item", "reply"),
    [
        (prediction(reply="x is 7"), "0.5"),
        (prediction(reply="7 or 2"), "1.0"),
        (prediction(answer="cat<OR>2<AND>7", reply="A CAT!"), "1.0"),
        (prediction(answer="", reply=""), "0.0"),
        (prediction("LLaVA-Bench", "a red square", "a red square"), "8 10"),
        (prediction("LLaVA-Bench", "a red square", ""), "8 1"),
        (prediction("MathVista", reply="so 1,200 of 3", question_type="free_form", answer_type="integer"), "3"),
        (prediction("MathVista", reply="it is (B)", question_type="multi_choice", answer_type="text"), "B"),
        (prediction("MathVista", reply="in [1, 2]", question_type="free_form", answer_type="list"), "[1, 2]"),
        (prediction("MathVista", reply="none", question_type="free_form", answer_type="float"), ""),
    ],
)
def test_the_offline_heuristic(item: Prediction, reply: str) -> None:
    heuristic = HeuristicJudge()
    assert heuristic.is_heuristic and "heuristic" in heuristic.name
    assert heuristic.ask(JudgeRequest(item, "")) == reply


def test_prompts_hold_their_parts_and_a_file_replaces_them(tmp_path: Path) -> None:
    filled = DEFAULT_PROMPTS.fill("mmvet", question="q $answer", answer="2 <AND> 7", reply="$5")
    assert "Question: q $answer\nReference: 2 <AND> 7\nAnswer: $5\nGrade:" in filled
    assert "$" not in DEFAULT_PROMPTS.fill("llavabench", caption="c", question="q", answer="a", reply="r")
    assert "$" not in DEFAULT_PROMPTS.fill("mathvista", question="q", reply="r")
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(asdict(replace(DEFAULT_PROMPTS, name="mine"))))
    assert load_prompts(path).name == "mine"
    without = path.read_text().replace("$reply", "")
    for content, message in (("[", "no JSON"), ("{}", "keys name, mmvet"), (without, "lacks $reply")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_prompts(path)
