"""Where below OUT a program that the worker starts finds kernels compiled for its processor, and leaves its own."""

from __future__ import annotations

from typing import Final

PROCESSOR_KERNELS: Final = "kernels/processor"
