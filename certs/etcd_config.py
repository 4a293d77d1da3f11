# SPDX-License-Identifier: Apache-2.0
"""The etcd.config file that Cilium's and Holdfast's agents read: endpoints, and paths of the TLS files.

The paths are those *inside* the container that reads it, so they are given, not derived from where the
file is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from certs.errors import BadRequest
from certs.layout import AUTHORITY_FILE, CERTIFICATE_MODE, Folder
from certs.material import write_file
from core.errors import shorten

ENDPOINT = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


def render(folder: Folder, endpoints: Sequence[str], seen_at: PurePosixPath) -> str:
    """Return the file for the holder of `folder`, whose files the reader sees in the folder `seen_at`.

    Raises BadRequest for an endpoint that is not a URL of scheme, host and port.
    """
    for endpoint in endpoints:
        if not ENDPOINT.fullmatch(endpoint):
            raise BadRequest(
                f"{shorten(endpoint)!r} is no etcd endpoint", hint="such as https://10.0.0.1:2379"
            )
    content = {
        "endpoints": list(endpoints),
        "trusted-ca-file": str(seen_at / AUTHORITY_FILE),
        "cert-file": str(seen_at / folder.certificate.name),
        "key-file": str(seen_at / folder.key.name),
    }
    return yaml.safe_dump(content, sort_keys=False)


def write(folder: Folder, endpoints: Sequence[str], seen_at: PurePosixPath, *, overwrite: bool) -> list[Path]:
    """Write etcd.config where there is none, or another one and `overwrite`; return what was written."""
    text = render(folder, endpoints, seen_at).encode()
    exists = folder.config.exists()
    if exists and (not overwrite or folder.config.read_bytes() == text):
        return []
    write_file(folder.config, text, CERTIFICATE_MODE)
    return [folder.config]
