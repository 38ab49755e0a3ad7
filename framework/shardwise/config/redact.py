"""Secrets out of everything that is stored or shown: by the names they stand under, by their shape.

Secrets come from the environment only. So the values of variables that look like secrets are
looked for; whatever else finds its way into a recipe, a URL or a message is known by its shape
(provider prefixes, JWT, PEM, ``Basic`` and ``Bearer``, credentials in URLs) or by its name.
Ordinary values must stay as they are: a stored recipe is read again. Names of a data set, paths,
hashes and URLs without credentials are not touched (tests/config/test_redact.py holds both sides).
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

HIDDEN = "<redacted>"

_MIN_LENGTH = 8  # of a variable's value: a shorter one ("1", "true") would blank out ordinary text

# Variables of the environment whose values are secret.
_VARIABLE = re.compile(
    r"(?i)(?:(?:^|_)(?:api_?key|key|token|pwd|pass|pat|auth|credentials?)|secret|password|passwd"
    r"|passphrase|apikey|accesskey)(?:_id)?$"
)
_DIRECTORIES = ("PWD", "OLDPWD")  # the shell's

# Ends of a key under which any value is secret. "token" alone is not one of them: models have many.
_NAME = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret|credentials?|authorization|private[_-]?key"
    r"|(?:api|access|secret|signing|encryption|account|shared|master|deploy|client|service)[_-]?key"
    r"|sharedaccess(?:key|signature)|(?:api|access|auth|refresh|bearer|session|security|secret"
    r"|hf|hub|huggingface|github|gitlab|wandb|slack|private)[_-]?token)(?:[_-]?id)?"
)
_KEY = re.compile(rf"(?i){_NAME}$")
_TOKEN_VARIABLE = (  # HF_TOKEN, but not EOS_TOKEN
    r"(?<![A-Za-z0-9_])(?!(?:EOS|BOS|PAD|UNK|MASK|SEP|CLS|STOP|END|START|IMAGE|SPECIAL)_)"
    r"[A-Z][A-Z0-9_]{0,64}_TOKEN"
)
# What may stand under such a name and tells nothing.
_HARMLESS = re.compile(
    rf"(?i)(?:null|none|true|false|~|\.\.\.|\*+|{HIDDEN}|\$\{{?\w+\}}?|env[:.]\w+|)[\"']?"
)

# Quoted, quoted inside of a quoted text, or up to the next space; a quote may be a part of it.
_VALUE = (
    r"\"(?:[^\"\\]|\\.)*+\"|'(?:[^'\\]|\\.)*+'|\\\"[^\"]*\\\"|\\'[^']*\\'"
    r"|[^\s\"']+(?:[\"'](?=[^\s,;:)\]}])[^\s\"']*)*|[\"'][^\s]+"
)
# No form begins with a repeat: what must stand before it is looked for backwards (see `_after`),
# so that long texts cost their length.
_NAMED = re.compile(rf"(?i)({_NAME}\\?[\"']?\s{{0,4}}[:=]\s{{0,4}})({_VALUE})")
_NAMED_TOKEN = re.compile(rf"({_TOKEN_VARIABLE}=)({_VALUE})")
_OPTION = re.compile(rf"(?i)({_NAME}\s{{1,4}})({_VALUE})")
_HEADER = re.compile(r"(?i)(\bauthorization\\?[\"']?\s*[:=]\s*[\"']?)([a-z]+\s+)?([^\s\"',}]+)")
_NETRC = re.compile(r"(\bmachine\s+\S+\s+login\s+\S+\s+password\s+)(\S+)")

_URL = re.compile(r"((?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,30}:(?:\\?/){1,2})([^\s\"'<>`]+)", re.I)
_QUERY = re.compile(
    r"(?i)((?:token|key|keyid|key-id|secret|password|passwd|pwd|signature|sig|credential|auth|session"
    r"|policy)=)([^&\s\"'<>]+)"
)
_ADDRESS = re.compile(r"(?<![\w/.+-])()([\w.+-]+:[^\s:@/\"']{3,}(?=@[\w.-]+:\d{2,5}\b))")

_START = r"(?<![A-Za-z0-9])"
# Each with the providers' own prefix; the length keeps words that merely begin so.
_PREFIXES = [
    r"hf_(?=[A-Za-z]*[0-9]|[a-z]*[A-Z]|[A-Za-z]{24})[A-Za-z0-9]{16,}",
    r"gh[opsur]_[A-Za-z0-9]{16,}",
    r"github_pat_\w{16,}",
    r"gl(?:pat|dt|ptt|rt|soat|ft|agent|cbt|imt)-[\w.-]{16,}",
    r"sk-(?:proj|ant|or|svcacct|admin|lf|live|test)-[\w-]{8,}",
    r"sk-(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}[\w-]*",
    r"sk-[A-Za-z]{32,}",
    r"[rs]k_(?:live|test|prod)_\w{8,}",
    r"(?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Z0-9])",
    r"xox[abeoprs](?:\.xox[bp])?-[\w-]{8,}",
    r"xapp-\d-[\w-]{8,}",
    r"AIza[\w-]{30,}",
    r"ya29\.[\w-]{16,}",
    r"GOCSPX-[\w-]{16,}",
    r"npm_[A-Za-z0-9]{30,}",
    r"pypi-[\w-]{32,}",
    r"dckr_(?:pat|oat)_[\w-]{16,}",
    r"nvapi-[\w-]{20,}",
    r"gsk_[A-Za-z0-9]{24,}",
    r"r8_[A-Za-z0-9]{24,}",
    r"SG\.[\w-]{16,}\.[\w-]{16,}",
    r"whsec_\w{16,}",
    r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    r"do[opr]_v1_[0-9a-f]{32,}",
    r"lin_api_\w{24,}",
    r"wandb_v\d_\w{16,}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{20,}",
    r"eyJ[\w-]{8,}(?:\.[\w-]*){1,4}",  # JWT, JWE: three or five parts
    r"\d{8,10}:AA[\w-]{32,}",  # Telegram
]
_WHOLE = re.compile(rf"()({_START}(?:{'|'.join(_PREFIXES)}))")
_HOOKS = re.compile(r"((?:hooks\.slack\.com/services|/api/webhooks)/)([\w/-]+)")
_PEM = re.compile(
    r"(-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----)"
    r"((?:[^-]|-(?!----))*+(?:-----END [A-Z0-9 ]*-----)?)"
)
_WANDB = re.compile(r"(?i)(wandb[^\n]{0,40}?(?<![0-9a-z]))([0-9a-f]{40}(?![0-9a-z]))")
_BASIC = re.compile(r"(?i)(\bbasic\s+)([a-z0-9+/]{4,}={0,2})(?![\w-])")
_BEARER = re.compile(r"(?i)(\bbearer\s+)([\w.~+/-]{8,}=*)")


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """``text`` without secrets; ``environ`` (default: this process's) names those to look for."""
    return _without(text, _secrets(environ))


def redact_data(data: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Plain data with every text redacted, and whole values under keys such as ``api_key``."""
    return _clean(data, _secrets(environ))


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for form, is_secret in _FORMS:
        text = form.sub(_hide(is_secret), text)
    return _URL.sub(_without_userinfo, text)


def _clean(data: Any, secrets: Sequence[str]) -> Any:
    if isinstance(data, str):
        return _without(data, secrets)
    if isinstance(data, list):
        flags = [None, *data]
        return [
            _hidden(item) if _is_flag(flag) else _clean(item, secrets)
            for flag, item in zip(flags, data)
        ]
    if isinstance(data, dict):
        # A list of headers or variables says the name in a value: {name: Authorization, value: x}.
        named = any(is_secret_name(data.get(k)) for k in ("name", "key", "header", "variable"))
        return {
            _clean_key(key): _hidden(value)
            if is_secret_name(key) or (named and key == "value") or _is_wandb_key(key, value)
            else _clean(value, secrets)
            for key, value in data.items()
        }
    return data


@functools.lru_cache(4096)
def _clean_key(key: Any) -> Any:
    """The same keys come at every step; they are known by their shape only."""
    return _without(key, ()) if isinstance(key, str) else key


@functools.lru_cache(4096)
def _is_secret_name(name: str) -> bool:
    last = name.rpartition(".")[2]
    return bool(_KEY.search(last) or re.fullmatch(_TOKEN_VARIABLE, last))


def is_secret_name(name: Any) -> bool:
    """Whether a key, dotted or not, holds a secret by its name."""
    return isinstance(name, str) and _is_secret_name(name)


def _is_flag(item: Any) -> bool:
    """An option in a list of arguments, whose value is the next item."""
    return isinstance(item, str) and item.startswith("-") and is_secret_name(item)


def _is_wandb_key(key: Any, value: Any) -> bool:
    return isinstance(value, str) and _WANDB.fullmatch(f"{key} {value}") is not None


def _hidden(value: Any) -> Any:
    """``value`` with every text and number in it hidden; what says nothing stays."""
    if isinstance(value, dict):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    if value is None or isinstance(value, bool) or _HARMLESS.fullmatch(str(value)):
        return value
    return HIDDEN


def _secrets(environ: Mapping[str, str] | None) -> list[str]:
    """Values to look for, as they are and as URLs, JSON and Python spell them; longest first."""
    values = {
        value
        for name, value in (os.environ if environ is None else environ).items()
        if len(value) >= _MIN_LENGTH and name not in _DIRECTORIES and _VARIABLE.search(name)
    }
    spelt = {s for v in values for s in (v, quote(v, safe=""), json.dumps(v)[1:-1], repr(v)[1:-1])}
    return sorted(spelt, key=len, reverse=True)


def _hide(is_secret: Callable[[re.Match[str]], bool]) -> Callable[[re.Match[str]], str]:
    """Replaces the last group, and keeps the quotes around it."""

    def replace(match: re.Match[str]) -> str:
        kept, value = match[0][: -len(match[match.lastindex or 0])], match[match.lastindex or 0]
        if HIDDEN in value or not is_secret(match):
            return match[0]
        mark = value[0] if value[0] in "\"'" and value[-1] == value[0] else ""
        return f"{kept}{mark}{HIDDEN}{mark}"

    return replace


def _always(match: re.Match[str]) -> bool:
    return True


def _says_something(match: re.Match[str]) -> bool:
    """A value under a secret's name; PWD is a directory in every shell."""
    name, value = match[1].rstrip(" :=\"'\\"), match[2]
    if name.endswith(_DIRECTORIES) and value.startswith("/"):
        return False
    return not _HARMLESS.fullmatch(value.strip("\"'"))


def _after(before: str) -> Callable[[re.Match[str]], bool]:
    """Whether the text right before says something, too."""
    pattern = re.compile(before)
    return lambda m: (
        pattern.search(m.string, max(m.start() - 64, 0), m.start()) is not None
        and not _HARMLESS.fullmatch(m[2])
    )


def _is_basic(match: re.Match[str]) -> bool:
    """``user:password`` in base 64; "basic training" is not."""
    value = match[2].rstrip("=")
    try:
        said = base64.b64decode(value + "=" * (-len(value) % 4), validate=True).decode()
    except (binascii.Error, ValueError):
        return False
    return ":" in said and said.isprintable() and value != value.lower()


def _is_bearer(match: re.Match[str]) -> bool:
    """A token, not a word: digits among the letters, or small and capital ones at length."""
    value = match[2]
    mixed = value.lower() != value != value.upper() and len(value) >= 16
    return mixed or bool(re.search(r"\d", value) and re.search(r"[A-Za-z._-]", value))


def _without_userinfo(match: re.Match[str]) -> str:
    """A URL without ``user:password@`` or ``token@``."""
    scheme, rest = match[1], match[2]
    authority = re.match(r"[^/?#\\]*", rest)[0]  # type: ignore[index]  # matches always
    at = authority.rfind("@")
    if at < 0 and ":" in authority:
        # user:pass/word@host: what follows the colon is no port, or what precedes it no host
        host, _, port = authority.partition(":")
        at = rest.rfind("@")
        if port.isdigit() and ("." in host or host == "localhost" or rest[at - 1] == "/"):
            at = -1
    if at < 0:
        return match[0]
    user = rest[:at]
    web = scheme.lower().partition(":")[0].endswith(("http", "https", "ftp"))
    if not web and re.fullmatch(r"[A-Za-z_][\w.-]{0,19}", user):
        return match[0]  # ssh://git@host: a name, no secret
    return f"{scheme}{HIDDEN}{rest[at:]}"


_FORMS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]] = [
    (_PEM, _always),
    (_WHOLE, _always),
    (_HEADER, lambda match: not _HARMLESS.fullmatch(match[3])),
    (_BASIC, _is_basic),
    (_BEARER, _is_bearer),
    (_QUERY, _after(r"[?&;#][\w.-]*\Z")),
    (_NAMED, _says_something),
    (_NAMED_TOKEN, _says_something),
    (_OPTION, _after(r"--[\w.-]*\Z")),
    (_NETRC, _always),
    (_HOOKS, _always),
    (_WANDB, _always),
    (_ADDRESS, _always),
]
