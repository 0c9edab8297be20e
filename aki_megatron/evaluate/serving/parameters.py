"""The parameters of a request to /v1/chat/completions: checked one by one, refused by name."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aki_megatron.evaluate.sampling import GREEDY, Sampling
from aki_megatron.evaluate.serving.errors import ApiError, bad_request
from aki_megatron.evaluate.serving.limits import Limits

MAX_STOPS, MAX_STOP_CHARS = 16, 200

MAX_SHOWN = 80
"""Characters of a value that a message quotes."""

READ = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stream", "stream_options", "n",
)  # fmt: skip
"""Parameters that have an effect."""

IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "verbosity", "reasoning_effort", "media_io_kwargs", "chat_template_kwargs",
)  # fmt: skip
"""Parameters that may have any value: they change no answer of this model."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "num_beams": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
"""Parameters that this server does not have, and the values that ask for nothing."""


@dataclass(frozen=True)
class Parameters:
    """How a request is answered.

    max_new_tokens  of the answer, within the server's limit
    stop_texts      the answer ends before the first of them
    stream          whether the answer is sent in pieces
    include_usage   whether the pieces end with the numbers of tokens
    """

    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_texts: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_parameters(body: Mapping[str, Any], model: str, limits: Limits) -> Parameters:
    """Return the parameters of a request. A parameter that is null counts as absent.

    model  the name of the model that is served

    Raises ApiError: 404 for another model, 400 for everything else, with the parameter's name.
    """
    given = {name: value for name, value in body.items() if value is not None}
    _check_model(given.get("model", model), model)
    for name, value in given.items():
        _check_known(name, value)
    if _whole(given, "n", 1, 128, 1) != 1:
        raise bad_request(f"n={_shown(given['n'])}: one answer a request is given; ask several times.", "n")
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise bad_request(f"stream_options must be an object, got {_shown(options)}.", "stream_options")
    asked = _whole(given, "max_tokens", 1, 2**31, limits.default_new_tokens)
    asked = _whole(given, "max_completion_tokens", 1, 2**31, asked)
    return Parameters(
        max_new_tokens=min(asked, limits.new_tokens),
        sampling=_sampling(given),
        stop_texts=_stop_texts(given.get("stop", ())),
        stream=_flag(given, "stream"),
        include_usage=_flag({} if options.get("include_usage") is None else options, "include_usage"),
    )


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        raise bad_request(f"model must be text, got {_shown(name)}.", "model")
    if name != model:
        raise ApiError(
            404, f"The model {_shown(name)} does not exist; this server has {model!r}.", "model", "model_not_found"
        )


def _check_known(name: str, value: Any) -> None:
    if name in READ or name in IGNORED:
        return
    if name not in NEUTRAL:
        raise bad_request(
            f"The parameter {_shown(name)} is unknown; this server has {', '.join(READ)}.", name[:MAX_SHOWN]
        )
    if not any(type(value) in _alike(neutral) and value == neutral for neutral in NEUTRAL[name]):
        allowed = " or ".join(map(repr, NEUTRAL[name]))
        raise bad_request(
            f"{name}={_shown(value)} is not supported by this server; leave it out (only {allowed} is accepted).", name
        )


def _alike(neutral: Any) -> tuple[type, ...]:
    """Return the types of values that may equal a neutral value: 0.0 does, False does not."""
    return (int, float) if type(neutral) is int else (type(neutral),)


def _sampling(given: Mapping[str, Any]) -> Sampling:
    temperature = _number(given, "temperature", 0.0, 100.0, 0.0)
    top_p = _number(given, "top_p", 0.0, 1.0, 1.0)
    top_k = _whole(given, "top_k", -1, 2**31, 0)
    seed = _whole(given, "seed", -(2**63), 2**63 - 1, secrets.randbits(62))
    if temperature == 0.0 or top_p == 0.0 or top_k == 1:
        return GREEDY
    # a tiny temperature would divide logits to infinity
    return Sampling(temperature=max(temperature, 1e-3), top_k=max(top_k, 0), top_p=top_p, seed=seed % 2**63)


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise bad_request(f"stop must be a text or a list of texts, got {_shown(stop)}.", "stop")
    if len(texts) > MAX_STOPS or any(not 1 <= len(text) <= MAX_STOP_CHARS for text in texts):
        raise bad_request(f"stop must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters.", "stop")
    return tuple(texts)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false, got {_shown(value)}.", name)
    return value


def _whole(given: Mapping[str, Any], name: str, least: int, most: int, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON of some languages writes 16.0
    return _within(name, value, int, least, most)


def _number(given: Mapping[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = given.get(name, default)
    return _within(name, float(value) if _is_small(value) else value, float, least, most)


def _is_small(value: Any) -> bool:
    """Whether a value is an integer that a float can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _within(name: str, value: Any, kind: Callable[[Any], Any], least: float, most: float) -> Any:
    if type(value) is not kind or not least <= value <= most:  # NaN is not within anything
        word = "a whole number" if kind is int else "a number"
        raise bad_request(f"{name} must be {word} from {least} to {most}, got {_shown(value)}.", name)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, int) and not -(2**64) < value < 2**64:
        return "a huge number"  # Python refuses to write out thousands of digits
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
