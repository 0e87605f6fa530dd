"""OpenTelemetry: a span for each restore, sent over OTLP/HTTP (docs/metrics.md).

The SDK sends in a thread of its own, which no fault waits for. Where to, how often and with which attributes is said
by the standard variables of the environment (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_RESOURCE_ATTRIBUTES, ...).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode

from lazypages import __version__

log = logging.getLogger("lazypages")

#: Seconds at the end for the last spans to be sent.
FAREWELL = 3.0


class Spans:
    """Makes spans, and sends them until :meth:`close`."""

    def __init__(self) -> None:
        _log_as_ours()
        name = os.environ.get("OTEL_SERVICE_NAME", "lazypages")
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("lazypages", __version__)

    def start(self, attributes: Mapping[str, str | int]) -> Span:
        """A restorer has connected."""
        return self._tracer.start_span("restore", attributes=dict(attributes))

    def close(self) -> None:
        """Send what is left, for up to FAREWELL seconds."""
        # a collector that does not answer must not keep the daemon from its end
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(FAREWELL)
        if ending.is_alive():
            log.warning("--otel: the last spans were not sent within %g s", FAREWELL)


def end_span(span: Span, attributes: Mapping[str, str | int | float], *, ok: bool) -> None:
    span.set_attributes(dict(attributes))
    if not ok:
        span.set_status(Status(StatusCode.ERROR, "the restore has failed: the log says why"))
    span.end()


class _Ours(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.warning("--otel: %s", record.getMessage())


def _log_as_ours() -> None:
    """What the SDK logs goes into our log, and not to standard error, which may be closed."""
    theirs = logging.getLogger("opentelemetry")
    theirs.propagate = False
    theirs.handlers = [_Ours(logging.WARNING)]
