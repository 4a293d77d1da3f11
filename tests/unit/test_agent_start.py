# SPDX-License-Identifier: Apache-2.0
"""How the agent's process begins: what its imports do without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
SAY = (
    "import gc, json, os, ssl\n"
    "made = []\n"
    "plain = ssl.create_default_context\n"
    "def noted(*given, **named):\n"
    "    made.append(plain(*given, **named))\n"
    "    return made[-1]\n"
    "ssl.create_default_context = noted\n"
    "from agent import start\n"
    "status = start.main(['--no-such-option', 'x'])\n"
    "print(json.dumps([status, gc.isenabled(), os.environ.get('SSL_CERT_FILE'),\n"
    "                  sum(len(each.get_ca_certs()) for each in made)]))\n"
)


def started(**environment: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", SAY],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said: list[Any] = json.loads(done.stdout)
    return said


def test_no_authority_is_read_and_the_environment_is_as_it_was() -> None:
    """The exit code is that of a configuration that can not be used."""
    assert started(SSL_CERT_FILE="/etc/ssl/certs/ca-certificates.crt") == [
        2,
        True,
        "/etc/ssl/certs/ca-certificates.crt",
        0,
    ]
