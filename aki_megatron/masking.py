"""Keep secrets out of what a run writes: config.yaml, reports, trackers, logs, error messages.

A ``pipe:`` command or a URL may hold a password, a token or a signature. Their text is masked wherever it leaves the
process: ``mask_values`` for settings, ``mask_text`` for everything else. What looks like a secret is masked: user names
and passwords in URLs, query values, values of options and variables with such names, headers, and long random words. A
reference to an environment variable (``$TOKEN``) is no secret and stays.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

PIPE = "pipe:"
MASK = "***"

MARKER = re.compile(r"^(?P<text>.*) \[masked (?P<digest>[0-9a-f]{16})\]$", re.DOTALL)
"""Saved form of a value that holds a secret: its masked text and a digest of the whole, to compare it with."""

DIGEST_ROUNDS = 100_000
"""Rounds of PBKDF2: a digest beside a mask must not reveal a weak password to a quick search."""

SHORTEST_KNOWN = 6
"""Characters of the shortest secret that mask_text looks for everywhere; shorter ones are parts of ordinary words."""

_SECRET_NAME = re.compile(
    r"pass|pwd|token|secret|key|auth|cred|sig|user|login|header|cookie|bearer|session|data|form", re.I
)
_SECRET_OPTIONS = frozenset({"-u", "-U", "-p", "-P", "-H", "-b", "-d", "-F", "-k", "-K", "-a", "-A"})
_VARIABLE = re.compile(r"\$\{\w+\}|\$\w+|\$\([^()]*\)")
_HEADER_NAME = re.compile(r"^[\w-]+: ")
_TOKEN = re.compile(r"[A-Za-z0-9]{20,}")
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_SEPARATOR = re.compile(r"\s+|[|&;<>()]+")
_WORD = re.compile(r"""(?:\$\{\w+\}|\$\([^()]*\)|[^\s'"|&;<>()\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")
_SIMPLE = re.compile(r"[\w.,:@%+=/{}~*\[\]$-]+")
_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?:(?P<user>[^/?#@\s]*)@)?(?P<rest>[^?#]*)(?P<query>\?.*)?")
_URL_IN_TEXT = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>|\\]+")

_TEXT_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(?i)\b((?:proxy-)?authorization|cookie|x-[\w-]*(?:token|key|auth)[\w-]*)\s*:\s*[^\n'\"]+"),
        r"\1: ***",
    ),
    (
        re.compile(r"\b([A-Z][A-Z0-9_]*(?:PASSWORD|PASSWD|SECRET|TOKEN|KEY|CREDENTIALS?)[A-Z0-9_]*=)(?!\$)\S+"),
        rf"\1{MASK}",
    ),
    (
        re.compile(r"(--(?:password|passwd|token|user|secret|[\w-]+-(?:key|token|secret|password))[= ])(?![-$])\S+"),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (re.compile(r"\b(?:gh[pousr]_|hf_|glpat-|xox[abpsr]-|sk-)[A-Za-z0-9_-]{16,}"), MASK),
)

_KINDS: tuple[Callable[[str], bool], ...] = (str.isdigit, str.islower, str.isupper)
"""A random word has characters of each kind."""

_known: set[str] = set()
"""Secrets that this process has masked; they only grow."""


def mask_text(text: str) -> str:
    """Return a text, such as an error message or the output of a command, without its secrets."""
    for secret in sorted(_known.copy(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _URL_IN_TEXT.sub(lambda match: _mask_url(match[0]), text)
    for pattern, replacement in _TEXT_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def mask_values(value: Any, *, digests: bool = False) -> Any:
    """Return settings, nested as YAML holds them, without the secrets of their commands and URLs.

    digests  append to each masked text a digest of the whole, so that masked settings still can be compared
    """
    if isinstance(value, str):
        return _mask_setting(value, digests)
    if isinstance(value, Mapping):
        return {key: mask_values(inner, digests=digests) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_values(inner, digests=digests) for inner in value]
    return value


def is_masked(text: str) -> bool:
    """Return whether a setting is the saved form of one that held a secret."""
    return MARKER.match(text) is not None


def _mask_setting(text: str, digests: bool) -> str:
    if is_masked(text):
        return text
    bare = text.lstrip()
    if bare.startswith(PIPE):
        masked = PIPE + mask_command(bare.removeprefix(PIPE))
    elif (url := _URL.fullmatch(bare)) is not None and url["scheme"]:
        masked = _mask_url(bare)
    else:
        return text
    if masked == bare:
        return text
    return f"{masked} [masked {_digest(masked, text)}]" if digests else masked


@cache
def _digest(masked: str, text: str) -> str:
    return hashlib.pbkdf2_hmac("sha256", text.encode(), masked.encode(), DIGEST_ROUNDS, dklen=8).hex()


def mask_command(command: str) -> str:
    """Return a shell command with its secrets masked; wholly masked where it cannot be taken apart."""
    parts, position = [], 0
    state = _WordState()
    while position < len(command):
        if (separator := _SEPARATOR.match(command, position)) is not None:
            state.after_separator(separator[0])
            parts.append(separator[0])
            position = separator.end()
        elif (word := _WORD.match(command, position)) is not None:
            parts.append(state.mask(word[0]))
            position = word.end()
        else:  # an open quote
            return _remember(command)
    return "".join(parts)


class _WordState:
    """What the next word of a command is: a program, the value of an option with a secret name, or an argument."""

    def __init__(self) -> None:
        self.is_program = True
        self.is_secret = False

    def after_separator(self, separator: str) -> None:
        if set(separator) & set("|&;("):
            self.is_program, self.is_secret = True, False

    def mask(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if self.is_program and equals and name.isidentifier():
            return f"{name}={value if _only_variables(value) else _remember(value)}"
        was_secret, self.is_secret = self.is_secret and not self.is_program, False
        self.is_program = False
        if word.startswith("-") and len(word) > 1:
            return self._mask_option(name, equals, value)
        if was_secret and not (_is_location(word) or _only_variables(word)):
            return _remember(word)
        return _mask_argument(word)

    def _mask_option(self, name: str, equals: str, value: str) -> str:
        has_secret_name = name in _SECRET_OPTIONS or (name.startswith("--") and bool(_SECRET_NAME.search(name)))
        if equals:
            is_secret = has_secret_name and not _only_variables(value)
            return f"{name}={_remember(value) if is_secret else _mask_argument(value)}"
        if name[:2] in _SECRET_OPTIONS and len(name) > 2 and not name[2:].isalpha():  # -uNAME:PASSWORD
            return name[:2] + (name[2:] if _only_variables(name[2:]) else _remember(name[2:]))
        self.is_secret = has_secret_name
        return _mask_argument(name)


def _is_location(word: str) -> bool:
    bare = word.strip("'\"")
    return bare.startswith(("/", "./", "~/")) or "://" in bare


def _only_variables(word: str) -> bool:
    """Return whether a word is made of references to variables, and of the names and punctuation of a header."""
    rest, count = _VARIABLE.subn("", word.strip("'\""))
    return count > 0 and re.fullmatch(r"(?:[\w-]+:\s?)?(?:Bearer|Basic|Token|token)?\s?:?", rest) is not None


def _mask_argument(word: str) -> str:
    quote = word[0] if word[:1] in ("'", '"') and word[-1:] == word[:1] and len(word) > 1 else ""
    bare = word[1:-1] if quote else word
    if "://" in bare and (url := _URL.fullmatch(bare)) is not None:
        masked = _mask_url(url[0])
    elif _only_variables(word):
        return word
    elif _SIMPLE.fullmatch(bare):
        name, equals, value = bare.partition("=")
        if equals and _SECRET_NAME.search(name) and not _only_variables(value):
            return f"{quote}{name}={_remember(value)}{quote}"
        masked = _mask_tokens(bare)
    else:
        return f"{quote}{_remember(bare)}{quote}"
    return f"{quote}{masked}{quote}"


def _mask_url(url: str) -> str:
    match = _URL.match(url)
    if match is None:
        return url
    user, query = match["user"], match["query"] or ""
    if user is not None and not _only_variables(user):
        user = _remember(user)
    head = match["scheme"] + ("" if user is None else f"{user}@") + _mask_tokens(match["rest"])
    return head + re.sub(r"([?&])([^=&]*)(=[^&]*)?", _mask_query, query) + url[match.end() :]


def _mask_query(match: re.Match[str]) -> str:
    start, name, value = match[1], match[2], (match[3] or "")[1:]
    if not match[3]:
        return start + (name if len(name) <= 12 else _remember(name))
    harmless = re.fullmatch(r"[\w.-]{0,12}", value) is not None and not _SECRET_NAME.search(name)
    return f"{start}{name}={value if harmless or _only_variables(value) else _remember(value)}"


def _mask_tokens(text: str) -> str:
    """Mask the long random words of a path or an argument."""

    def mask(match: re.Match[str]) -> str:
        word = match[0]
        random = all(any(map(is_kind, word)) for is_kind in _KINDS) or _HEX.fullmatch(word)
        return _remember(word) if random else word

    return _TOKEN.sub(mask, text)


def _remember(secret: str) -> str:
    """Return the mask in place of a secret, which mask_text knows from now on."""
    bare = secret.strip("'\"")
    for part in (bare, *re.split(r"[\s'\":=]+", _HEADER_NAME.sub("", bare))):
        ordinary = (part.isalpha() and len(part) < 12) or (part.isdigit() and len(part) < 10)
        if len(part) >= SHORTEST_KNOWN and not ordinary:
            _known.add(part)
    return MASK
