"""Structured logs: one JSON object a line on stdout, with the pod's name. Never personal data.

A line that is written within a traced call or batch has its `trace_id` and `span_id`.
"""

import logging
import sys

import structlog

from shared import telemetry


def configure(*, level: str, style: str, pod: str) -> None:
    """Send structlog and the standard library's logging the same way. `style` is json or console."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer()
    )
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        trace,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(pod=pod)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("aiokafka").setLevel(logging.ERROR)


def trace(
    _logger: structlog.typing.WrappedLogger, _name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Add the ids of what is under way, where it is traced."""
    if span := telemetry.current():
        known = span.get_span_context()
        event["trace_id"], event["span_id"] = f"{known.trace_id:032x}", f"{known.span_id:016x}"
    return event
