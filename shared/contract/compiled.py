"""Where a program that the worker starts finds kernels that were compiled for its processor, and leaves its own."""

from __future__ import annotations

from typing import Final

PROCESSOR_KERNELS: Final = "PROCESSOR_KERNELS_DIR"  # an environment variable
