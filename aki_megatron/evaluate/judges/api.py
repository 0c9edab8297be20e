"""A judge behind an OpenAI-compatible endpoint."""

import json
import threading
import time
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

from aki_megatron.evaluate.judges.judge import JudgeError, JudgeRequest, JudgeUnavailableError

MAX_REPLY_BYTES = 4 << 20
"""A longer answer of the server is refused."""

MAX_RETRY_SECONDS = 60.0
"""Longest pause before a retry, whatever the server asks for."""

_HOPELESS = {401: "the key is refused", 403: "the key may not use it", 404: "there is no such address or model"}
_RETRIED = {408, 409, 429, 500, 502, 503, 504}


class ApiJudge:
    """Sends each request to ``{base_url}/chat/completions``."""

    is_heuristic = False

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        prompts_name: str,
        key: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        retry_seconds: float = 1.0,
        max_consecutive_failures: int = 20,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        timeout                   seconds that one try may take in all
        retries                   further tries after a timeout, a lost connection, a busy server or garbage
        retry_seconds             pause before the first retry; doubled each time
        max_consecutive_failures  failed requests one after another that end the scoring
        """
        self.name = f"{model} ({prompts_name})"
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model, self._key = model, key
        self._timeout, self._retries, self._retry_seconds = timeout, retries, retry_seconds
        self._max_consecutive_failures = max_consecutive_failures
        self._num_failures = 0
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, request: JudgeRequest) -> str:
        """Return the model's reply. Raises JudgeError for this request, JudgeUnavailableError for all."""
        try:
            reply = self._with_retries(request)
        except JudgeError as error:
            with self._lock:
                self._num_failures += 1
                is_last = self._num_failures >= self._max_consecutive_failures
            if is_last:
                raise JudgeUnavailableError(
                    f"The judge {self.name} at {self._url} failed {self._num_failures} times one after another, "
                    f"last: {error}. Start it, or raise --judge_timeout; replies so far are in --judge_cache."
                ) from error
            raise
        with self._lock:
            self._num_failures = 0
        return reply

    def _with_retries(self, request: JudgeRequest) -> str:
        pause = self._retry_seconds
        for attempt in range(self._retries + 1):
            try:
                return self._ask_once(request)
            except _RetryableError as error:
                if attempt == self._retries:
                    raise JudgeError(str(error)) from error
                time.sleep(min(max(pause, error.retry_after), MAX_RETRY_SECONDS))
                pause *= 2
        raise AssertionError("the loop returns or raises")

    def _ask_once(self, request: JudgeRequest) -> str:
        try:
            return _reply_of(self._send(request))
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
            raise AssertionError("a refusal raises") from error
        except (OSError, HTTPException) as error:  # timeouts, lost connections, unknown hosts, half answers
            raise _RetryableError(f"{type(error).__name__}: {error}") from error

    def _send(self, request: JudgeRequest) -> bytes:
        """Return the body of the answer; TimeoutError where it is not there in time, however slowly it comes."""
        deadline = time.monotonic() + self._timeout
        system = [{"role": "system", "content": request.system}] if request.system else []
        body = {
            "model": self._model,
            "messages": [*system, {"role": "user", "content": request.prompt}],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        message = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        received = bytearray()
        with self._opener.open(message, timeout=self._timeout) as response:
            while chunk := response.read1(1 << 16):
                received += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the answer was not complete after {self._timeout:g} seconds")
                if len(received) > MAX_REPLY_BYTES:
                    raise JudgeError(f"the answer is longer than {MAX_REPLY_BYTES} bytes")
        return bytes(received)

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        """Raise what a status other than success means."""
        if error.code in _HOPELESS:
            raise JudgeUnavailableError(
                f"{self._url} answers {error.code}: {_HOPELESS[error.code]}. Check --judge, --judge_model and the "
                "variable that holds the key (--judge_key_variable)."
            )
        if error.code in _RETRIED:
            raise _RetryableError(f"HTTP status {error.code}", _retry_after(error.headers))
        raise JudgeError(f"HTTP status {error.code}")


class _RetryableError(Exception):
    """A try that failed and may succeed later, after ``retry_after`` seconds if the server said so."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirection: it would carry the key to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _retry_after(headers: Message) -> float:
    try:
        seconds = float(headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0


def _reply_of(body: bytes) -> str:
    """Return the text of a chat completion; a body of another form may be a passing fault of the server."""
    try:
        answer: Any = json.loads(body)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _RetryableError(f"the answer is no chat completion: {body[:80]!r}") from error
    if not isinstance(text, str):
        raise _RetryableError(f"the chat completion holds no text: {body[:80]!r}")
    return text
