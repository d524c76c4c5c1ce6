"""How many rows of a file repeat an earlier one, in bounded memory."""

from __future__ import annotations

import hashlib


class Repeats:
    """Counts repeated rows: exactly up to 2 * 10^5 distinct rows, beyond that from a sample by digest.

    All copies of a row share a digest, so keeping only digests divisible by a growing power of two
    is an unbiased sample (distinct sampling, Gibbons 2001).
    """

    _KEPT = 200_000

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._mask = 0

    def add(self, data: bytes) -> None:
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
        if digest & self._mask:
            return
        self._counts[digest] = self._counts.get(digest, 0) + 1
        if len(self._counts) > self._KEPT:
            self._mask = self._mask * 2 + 1
            self._counts = {digest: count for digest, count in self._counts.items() if not digest & self._mask}

    def estimate(self) -> int:
        return (sum(self._counts.values()) - len(self._counts)) * (self._mask + 1)
