# SPDX-License-Identifier: Apache-2.0
"""Logging: loguru, as text, as JSON lines, or to syslog.

Text goes to stderr for people and `docker logs`, JSON for collectors, syslog (RFC 3164 over /dev/log
or UDP) for the fleets that already have it.  The last records are kept in a ring for `bugtool`.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from collections import deque
from typing import TYPE_CHECKING

from loguru import logger

from core import metrics

if TYPE_CHECKING:
    from loguru import Message

TEXT = "{time:YYYY-MM-DDTHH:mm:ss.SSSZ} level={level.name} subsys={name} {message}"
RING_SIZE = 1000

ring: deque[str] = deque(maxlen=RING_SIZE)


def setup(
    driver: str = "text", level: str = "INFO", syslog: str = "/dev/log", facility: str = "local5"
) -> None:
    """Send everything to one driver: ``text``, ``json`` or ``syslog``; ValueError for another name."""
    logger.remove()
    if driver == "text":
        logger.add(sys.stderr, level=level, format=TEXT, backtrace=False, diagnose=False)
    elif driver == "json":
        logger.add(_write_json, level=level, format="{message}", backtrace=False, diagnose=False)
    elif driver == "syslog":
        logger.add(_syslog_handler(syslog, facility), level=level, format="{name}: {message}", diagnose=False)
    else:
        raise ValueError(f"log driver {driver!r} is not one of text, json, syslog")
    logger.add(_remember, level="INFO", format=TEXT, diagnose=False)
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def _write_json(message: Message) -> None:
    record = message.record
    line = {
        "time": record["time"].isoformat(),
        "level": record["level"].name.lower(),
        "subsys": record["name"],
        "msg": record["message"],
    }
    if record["exception"] is not None:
        line["error"] = str(record["exception"].value)
    sys.stderr.write(json.dumps(line) + "\n")


def _remember(message: Message) -> None:
    ring.append(str(message).rstrip())
    level = message.record["level"].name.lower()
    if level in ("warning", "error", "critical"):
        metrics.ERRORS_WARNINGS.labels(level, str(message.record["name"])).inc()


def _syslog_handler(address: str, facility: str) -> logging.handlers.SysLogHandler:
    host, separator, port = address.rpartition(":")
    target: str | tuple[str, int] = (host, int(port)) if separator and port.isdigit() else address
    return logging.handlers.SysLogHandler(target, facility=facility)


class _Forward(logging.Handler):
    """Sends what libraries log by the standard module into loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.opt(exception=record.exc_info).log(
            record.levelname, "{}: {}", record.name, record.getMessage()
        )
