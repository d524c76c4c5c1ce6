"""Whether this process makes OpenTelemetry traces. The standard variables ask for them; else nothing is imported.

Whatever is wrong with the wish, such as packages that are not there, is one loud line in the log and no failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import structlog

from shared.settings import open_telemetry_variables

if TYPE_CHECKING:
    from shared.operating.spans import Spans

log = structlog.get_logger()

# Names of services, unless the variables name one.
API: Final = "tunepool-api"
WORKER: Final = "tunepool-worker"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_PACKAGES: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
REMEDY: Final = "pip install 'tunepool-server[traces]'"


def asked_for(variables: Mapping[str, str]) -> bool:
    """Whether an exporter or its address is named and nothing says no. Pure."""
    exporter = variables.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    return bool(exporter) or any(name in variables for name in _ENDPOINTS)


def obstacle(variables: Mapping[str, str]) -> str | None:
    """Why traces that are asked for cannot be made, with the remedy; None where they can. Imports nothing of theirs."""
    exporter = variables.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    if exporter != "otlp":
        return f"OTEL_TRACES_EXPORTER is {exporter!r}; only otlp and none are known here"
    protocol = next((variables[name].strip().lower() for name in _PROTOCOLS if name in variables), _PROTOCOL)
    if protocol != _PROTOCOL:
        return f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; only {_PROTOCOL} is spoken here, mostly on port 4318"
    missing = [name for name in _PACKAGES if not _is_there(name)]
    return f"{', '.join(missing)} is not installed: {REMEDY}" if missing else None


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # nor is the package above it
        return False


def look() -> bool:
    """Whether this process would make traces; says so, or why not, in one line of the log. Imports nothing of theirs.

    For a process whose children make them.
    """
    variables = open_telemetry_variables()
    if not asked_for(variables):
        return False
    reason = obstacle(variables)
    if reason is not None:
        log.error("traces.off", reason=reason)
        return False
    log.info("traces.on", collector=next((variables[name] for name in _ENDPOINTS if name in variables), "the default"))
    return True


def opened(service: str) -> Spans | None:
    """What makes this process's spans, under the service's name unless the variables name one; None: nobody asked."""
    if not look():
        return None
    try:
        from shared.operating import spans  # who has not asked for traces does not pay for their libraries

        return spans.opened(service, open_telemetry_variables())
    except (ImportError, ValueError, TypeError, OSError) as error:
        log.error("traces.off", reason=f"the variables cannot be used: {error}"[:300])
        return None


@cache
def of_this_process(service: str) -> Spans | None:
    """`opened`, once per process."""
    return opened(service)


def close(service: str) -> None:
    """Bring away what waits, for a moment. Makes nothing that was not there."""
    if of_this_process.cache_info().currsize and (spans := of_this_process(service)) is not None:
        spans.close()
