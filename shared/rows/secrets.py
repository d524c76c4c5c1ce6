"""Secrets of well-known forms: in rows, which a trained model may repeat, and in logs, where they are hidden.

What looks like a secret is decided here and nowhere else.
"""

from __future__ import annotations

import re
from typing import Final

# The search for a literal is an order of magnitude faster than the pattern, and most lines hold none.
_SECRET: Final = {
    b"AKIA": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    b"sk-": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    b"ghp_": re.compile(rb"\bghp_[A-Za-z0-9]{36}"),
    b"github_pat_": re.compile(rb"\bgithub_pat_[A-Za-z0-9_]{22,}"),
    b"PRIVATE KEY": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    b"xox": re.compile(rb"\bxox[bp]-[A-Za-z0-9-]{10,}"),
    b"hf_": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    b"AIza": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}"),
}

HIDDEN: Final = "[hidden]"
# Of a log, where a word too much is hidden rather than one too few. (literal that must be there, what is hidden): the
# group `kept`, where there is one, stays. Without regard to case.
_IN_LOGS: Final = tuple(
    (hint, re.compile(pattern, re.IGNORECASE))
    for hint, pattern in (
        ("tp_", r"\btp_[A-Za-z0-9]{20,}(_[A-Za-z0-9]+)?"),  # our own keys
        ("whsec_", r"\bwhsec_[A-Za-z0-9+/=]{16,}"),
        ("glpat-", r"\bglpat-[A-Za-z0-9_-]{16,}"),
        ("eyj", r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(\.[A-Za-z0-9_-]*)?"),  # JSON web tokens (RFC 7519)
        ("@", r"(?P<kept>\b[a-z][a-z0-9+.-]{1,20}://)[^\s/@\"'<>]{1,512}@"),  # a URL's user and password
        ("authorization", r"(?P<kept>\b(proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)[^\s\"',]+(\s+[^\s\"',]+)?"),
        ("bearer", r"(?P<kept>\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
        # The signature of a link that opens an object: S3, Google Cloud, Azure.
        (
            "=",
            r"(?P<kept>[?&](x-amz-(signature|credential|security-token)|x-goog-signature|sig|signature|token)=)"
            r"[^&\s\"'<>]+",
        ),
        # NAME=value and "name": "value", where the name says what the value is.
        *(
            (
                hint,
                rf"(?P<kept>[\w.-]{{0,64}}{hint}[\w.-]{{0,64}}[\"']?\s*[=:]\s*)(\"[^\"]{{3,}}\"?|'[^']{{3,}}'?|[^\s\"',;&]{{6,}})",
            )
            for hint in ("passw", "secret", "api_key", "apikey", "api-key", "access_key", "credential")
        ),
        # A count of tokens is no secret: this one must not be all digits.
        (
            "token",
            r"(?P<kept>\b[\w.-]{0,64}token[\"']?\s*[=:]\s*[\"']?)(?=[^\s\"',;&]*[A-Za-z])[A-Za-z0-9._~+/=-]{16,}",
        ),
    )
)
_KEY_BEGINS: Final = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----")
_KEY_ENDS: Final = re.compile(r"-----END [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----")
KEY_LINES: Final = 200  # a private key that never ends hides no more than this


def holds_secret(data: bytes) -> bool:
    """Whether the text spells what looks like a key or a token."""
    return any(hint in data and pattern.search(data) for hint, pattern in _SECRET.items())


class SecretFilter:
    """Lines of a log, one after the other, without what looks like a secret; private keys take several lines."""

    def __init__(self) -> None:
        self._key_lines = 0

    def __call__(self, line: str) -> str:
        """The line with `[hidden]` for each secret."""
        if self._key_lines:
            self._key_lines -= 1
            if _KEY_ENDS.search(line):
                self._key_lines = 0
            return HIDDEN
        begin = _KEY_BEGINS.search(line)
        if begin is not None:
            self._key_lines = 0 if _KEY_ENDS.search(line, begin.end()) else KEY_LINES
            return hidden(line[: begin.start()]) + HIDDEN
        return hidden(line)


def hidden(line: str) -> str:
    """One line with `[hidden]` for each secret. Pure."""
    lowered = line.lower()
    for hint, pattern in _IN_LOGS:
        if hint in lowered:
            line = pattern.sub(_without, line)
    data = line.encode("utf-8", "replace")
    if holds_secret(data):
        for secret in _SECRET.values():
            data = secret.sub(HIDDEN.encode(), data)
        line = data.decode("utf-8")
    return line


def _without(match: re.Match[str]) -> str:
    return (match.groupdict().get("kept") or "") + HIDDEN + ("@" if match[0].endswith("@") else "")
