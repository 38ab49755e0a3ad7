"""Secrets out of everything that is stored or shown.

Secrets come from the environment only. So the values of variables that look like secrets are
looked for, and besides them credentials in URLs and text that has a well-known token's form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"

_NAMES = re.compile(
    r"(?i)(?:^|_)(?:api_?key|key|token|secret|password|passwd|credentials?)(?:_id)?$"
)
_MIN_LENGTH = 8  # a shorter value ("1", "true") would blank out ordinary text
_STRONG = r"(?:api_?key|password|passwd|secret|access_token|auth_token)"
_KEY = re.compile(rf"(?i){_STRONG}$")
_FORMS = [
    (re.compile(r"(:/{1,2})[^/\s:@\"']*:[^/\s@\"']+(?=@)"), r"\1"),  # scheme://user:password@host
    (re.compile(r"()\b(?:hf|gh[posu]|github_pat|glpat|sk|rk|xox[abpr])[_-][\w-]{16,}"), r"\1"),
    (re.compile(r"()\bAKIA[0-9A-Z]{16}\b"), r"\1"),
    (re.compile(r"(?i)(\bbearer )[\w.~+/-]{8,}=*"), r"\1"),
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature)=)[^&\s\"']+"), r"\1"),
    (re.compile(rf"(?i)(\b\w*{_STRONG}[\"']?\s*[:=]\s*[\"']?)[^\s\"',}}]+"), r"\1"),
]


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """``text`` without secrets; ``environ`` (default: this process's) names those to look for."""
    variables = os.environ if environ is None else environ
    secrets = {v for k, v in variables.items() if _NAMES.search(k) and len(v) >= _MIN_LENGTH}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for form, kept in _FORMS:
        text = form.sub(kept + HIDDEN, text)
    return text


def redact_data(data: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Plain data with every text redacted, and whole values under keys such as ``api_key``."""
    if isinstance(data, str):
        return redact(data, environ)
    if isinstance(data, list):
        return [redact_data(item, environ) for item in data]
    if isinstance(data, dict):
        return {
            key: HIDDEN
            if isinstance(value, str) and value and _KEY.search(key)
            else redact_data(value, environ)
            for key, value in data.items()
        }
    return data
