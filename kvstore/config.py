# SPDX-License-Identifier: Apache-2.0
"""etcd.config: where etcd is and which certificate to show it.

The file is Cilium's (YAML)::

    endpoints: ["https://10.0.0.1:2379", "https://10.0.0.2:2379"]
    trusted-ca-file: /etc/holdfast/certs/ca.crt     # older name: ca-file
    cert-file: /etc/holdfast/certs/agent.crt
    key-file: /etc/holdfast/certs/agent.key

Read by: agent, certs, external_resources and cli; used by kvstore.transport.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from core.errors import shorten
from kvstore.errors import ConfigError

_FIELDS = {"endpoints", "trusted-ca-file", "ca-file", "cert-file", "key-file", "insecure-transport"}


@dataclass(frozen=True)
class EtcdConfig:
    """Endpoints as URLs (`http://` or `https://`, host, port) and the files of the TLS connection."""

    endpoints: tuple[str, ...]
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        self._check("etcd configuration")

    @classmethod
    def load(cls, path: Path) -> EtcdConfig:
        """Read `path`; raises ConfigError that names the file, the field and the reason."""
        document = _read(path)
        unknown = sorted(set(document) - _FIELDS)
        if unknown:
            raise ConfigError(
                f"{path}: unknown field {shorten(unknown[0])!r}", hint=f"known: {sorted(_FIELDS)}"
            )
        return cls(
            endpoints=_endpoints(path, document.get("endpoints")),
            ca=_file(path, document, "trusted-ca-file") or _file(path, document, "ca-file"),
            cert=_file(path, document, "cert-file"),
            key=_file(path, document, "key-file"),
        )

    @property
    def secure(self) -> bool:
        """True when the endpoints are reached by TLS."""
        return self.endpoints[0].startswith("https://")

    def targets(self) -> list[str]:
        """Return host:port of each endpoint, in the order given."""
        return [urlsplit(endpoint).netloc for endpoint in self.endpoints]

    def fingerprint(self) -> tuple[int, ...]:
        """Return the change times of the TLS files: different after a rotation, 0 for a missing file."""
        return tuple(_changed(path) for path in (self.ca, self.cert, self.key) if path is not None)

    def read_tls(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return the contents of CA, key and certificate; raises ConfigError when one can not be read."""
        return _content("ca", self.ca), _content("key", self.key), _content("certificate", self.cert)

    def _check(self, origin: str) -> None:
        if not self.endpoints:
            raise ConfigError(f"{origin}: no endpoints", hint='endpoints: ["https://10.0.0.1:2379"]')
        for endpoint in self.endpoints:
            _check_endpoint(origin, endpoint)
        if len({endpoint.split(":")[0] for endpoint in self.endpoints}) > 1:
            raise ConfigError(f"{origin}: endpoints mix http:// and https://: {shorten(self.endpoints)}")
        if (self.cert is None) != (self.key is None):
            raise ConfigError(f"{origin}: cert-file and key-file are only useful together")
        if not self.secure and (self.ca or self.cert):
            raise ConfigError(f"{origin}: certificates are given but the endpoints are not https://")


def _read(path: Path) -> dict[str, object]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can not be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {shorten(str(error), 300)}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds {type(document).__name__}, not a mapping of fields")
    return {str(name): value for name, value in document.items()}


def _endpoints(path: Path, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{path}: endpoints is {shorten(value)}, not a list of URLs")
    return tuple(_with_scheme(each) for each in value)


def _with_scheme(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"http://{endpoint}"


def _check_endpoint(origin: str, endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        usable = False
    if not usable or parts.path not in ("", "/") or parts.query or parts.username:
        raise ConfigError(
            f"{origin}: endpoint {shorten(endpoint)!r} is not a URL of scheme, host and port",
            hint="https://10.0.0.1:2379",
        )


def _file(path: Path, document: dict[str, object], field: str) -> Path | None:
    value = document.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {field} is {shorten(value)}, not a path")
    return Path(value)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _content(what: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"etcd client {what} {path} can not be read: {error.strerror}") from error
