# SPDX-License-Identifier: Apache-2.0
"""The three ways out of the log, and the ring that is kept for diagnostics."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from core import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the process's logging as other tests expect it."""
    handlers = logging.root.handlers[:]
    yield
    log.setup()
    logging.root.handlers[:] = handlers


def test_text_names_time_level_and_subsystem(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("text")
    logger.warning("lease {} lost", 17)
    line = capsys.readouterr().err
    assert "level=WARNING subsys=" in line
    assert line.endswith("test_core_log lease 17 lost\n")


def test_json_is_one_object_a_line_with_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("json")
    try:
        raise OSError("no space left")
    except OSError as error:
        logger.opt(exception=error).error("checkpoint\nfailed")
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["msg"], found["error"]) == ("error", "checkpoint\nfailed", "no space left")


def test_syslog_gets_facility_and_severity(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "log"))
        receiver.settimeout(5)
        log.setup("syslog", syslog=str(tmp_path / "log"), facility="local5")
        logger.error("etcd is away")
        message = receiver.recv(4096)
        log.setup("text")
    assert message.startswith(b"<171>")  # facility local5 (21) * 8 + severity error (3)
    assert b"etcd is away" in message


def test_what_libraries_log_comes_out_too(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("text")
    logging.getLogger("somelib").warning("careful %s", "there")
    assert "somelib: careful there" in capsys.readouterr().err


def test_the_ring_keeps_the_last_records_and_no_more() -> None:
    log.setup("text", level="CRITICAL")
    for number in range(log.RING_SIZE + 5):
        logger.info("record {}", number)
    assert len(log.ring) == log.RING_SIZE
    assert log.ring[-1].endswith(f"record {log.RING_SIZE + 4}")


def test_an_unknown_driver_is_refused() -> None:
    with pytest.raises(ValueError, match="'carrier-pigeon' is not one of text, json, syslog"):
        log.setup("carrier-pigeon")
