"""Replay a judge's replies: what was asked once is not asked again, and scores are reproduced without the judge."""

import hashlib
import json
import threading
from pathlib import Path

from aki_megatron.errors import DataError
from aki_megatron.evaluate.jsonl import append_lines, read_lines
from aki_megatron.evaluate.judges.judge import Judge, JudgeError, JudgeRequest


def request_key(judge_name: str, request: JudgeRequest) -> str:
    """Return the hash of all that a reply depends on: prompt, judge, temperature, length."""
    parts = [judge_name, request.system, request.prompt, request.temperature, request.max_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ReplayedJudge:
    """A judge whose replies are in a file; a request that is not there fails."""

    is_heuristic = False

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self, request: JudgeRequest) -> str:
        """Raise JudgeError: the cache before this judge had no reply."""
        raise JudgeError("the request is not in the cache of replies")


class CachedJudge:
    """Answers from a file of replies, one JSON object a line, and appends what the judge behind it replies."""

    def __init__(self, judge: Judge, path: Path) -> None:
        """Read the file if there is one. Raises DataError for a line of another form, except one cut short."""
        self.name, self.is_heuristic = judge.name, judge.is_heuristic
        self._judge, self._path = judge, path
        self._lock = threading.Lock()
        self._replies = _read(path) if path.exists() else {}
        self.num_replayed = 0

    def ask(self, request: JudgeRequest) -> str:
        """Return the reply of the file, or ask the judge. A failure is not kept."""
        key = request_key(self.name, request)
        with self._lock:
            if key in self._replies:
                self.num_replayed += 1
                return self._replies[key]
        reply = self._judge.ask(request)
        with self._lock:
            self._replies[key] = reply
            append_lines(self._path, [{"key": key, "judge": self.name, "reply": reply}])
        return reply


def _read(path: Path) -> dict[str, str]:
    replies: dict[str, str] = {}
    for number, record in read_lines(path):
        if not isinstance(record.get("key"), str) or not isinstance(record.get("reply"), str):
            raise DataError(f"{path}:{number} is no cached reply; remove the line.")
        replies[record["key"]] = record["reply"]
    return replies
