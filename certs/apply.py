# SPDX-License-Identifier: Apache-2.0
"""Looks (`survey`) and does (`apply`) what a plan says: the only module that writes keys.

A key is written before its certificate: what an interruption leaves is a key alone, which the next run
certifies.  If anything is refused, nothing at all is written.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509

from certs import authority as authorities
from certs.errors import CertificateError
from certs.inspect import Finding, examine
from certs.issue import VALIDITY, Request, issue, utc_now
from certs.layout import Folder, Holder, Layout
from certs.material import Pair, load_certificate, load_key, write_certificate, write_key
from certs.plan import Action, Step, refusals


def survey(
    layout: Layout,
    requests: Sequence[Request],
    *,
    into: Mapping[Holder, Path] | None = None,
    now: datetime.datetime | None = None,
) -> tuple[Finding, list[tuple[Request, Finding]]]:
    """Return what is there of the CA and of each request; `into` names folders outside the layout."""
    moment = now or utc_now()
    root = layout.folder(Holder.AUTHORITY)
    folders = [layout.folder(request.holder, (into or {}).get(request.holder)) for request in requests]
    return survey_folders(root, list(zip(requests, folders, strict=True)), moment)


def survey_folders(
    root: Folder, wanted: Sequence[tuple[Request, Folder]], now: datetime.datetime
) -> tuple[Finding, list[tuple[Request, Finding]]]:
    """Return what is there of the CA in `root`, and of each request in its folder."""
    finding = examine(root, None, now)
    certificate = load_certificate(root.certificate) if finding.summary else None
    return finding, [(request, examine(folder, certificate, now)) for request, folder in wanted]


def apply(
    steps: Sequence[Step],
    *,
    validity: datetime.timedelta = VALIDITY,
    authority_validity: datetime.timedelta = authorities.VALIDITY,
    now: datetime.datetime | None = None,
) -> list[Path]:
    """Carry out a plan and return the files written; CertificateError, and nothing done, if it refuses."""
    refused = refusals(steps)
    if refused:
        raise CertificateError("; ".join(refused))
    written: list[Path] = []
    first, *others = steps
    if first.action.signs:
        write_pair(first, authorities.create(validity=authority_validity, now=now), None, written)
    certificate = load_certificate(first.folder.certificate)
    signer = authorities.load(first.folder, now=now) if any(step.action.signs for step in others) else None
    for step in others:
        _carry_out(step, certificate, signer, validity, now, written)
    return written


def write_pair(step: Step, pair: Pair, authority: x509.Certificate | None, written: list[Path]) -> None:
    """Write key (unless it is there already), CA and certificate, and add the paths to `written`."""
    folder = step.folder
    if step.action is not Action.CERTIFY:
        write_key(folder.key, pair.key)
        written.append(folder.key)
    if authority is not None:
        write_certificate(folder.authority, authority)
        written.append(folder.authority)
    write_certificate(folder.certificate, pair.certificate)
    written.append(folder.certificate)


def _carry_out(
    step: Step,
    certificate: x509.Certificate,
    signer: Pair | None,
    validity: datetime.timedelta,
    now: datetime.datetime | None,
    written: list[Path],
) -> None:
    if step.action is Action.COPY:
        write_certificate(step.folder.authority, certificate)
        written.append(step.folder.authority)
    elif step.action.signs and signer is not None and step.request is not None:
        key = load_key(step.folder.key) if step.action is Action.CERTIFY else None
        write_pair(
            step, issue(signer, step.request, key=key, validity=validity, now=now), certificate, written
        )
