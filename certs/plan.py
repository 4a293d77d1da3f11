# SPDX-License-Identifier: Apache-2.0
"""What has to be done so that everybody who is wanted has a certificate.  Pure: findings in, steps out.

    there is                        then
    nothing                         CREATE   key and certificate
    a key alone                     CERTIFY  a certificate for it
    an etcd certificate that lacks  CERTIFY  again for the same key (a member's address changed)
      an address or the name
    something broken                REFUSE   and say what; with --renew REPLACE
    a good pair, an old ca.crt      COPY     the CA's certificate beside it
    a good pair                     KEEP     (with a warning when it expires soon)

An existing key is only ever replaced by REPLACE, and that only for a holder that was named.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from certs.inspect import Condition, Finding, Summary
from certs.issue import Request
from certs.layout import Folder, Holder


class Action(enum.Enum):
    """What a step does to a holder's files."""

    CREATE = "create"
    CERTIFY = "certify"
    REPLACE = "replace"
    COPY = "copy ca.crt"
    KEEP = "keep"
    REFUSE = "refuse"

    @property
    def signs(self) -> bool:
        """True for steps that need the CA's key."""
        return self in (Action.CREATE, Action.CERTIFY, Action.REPLACE)


@dataclass(frozen=True)
class Step:
    """One holder's step; `request` is None for the CA, `warning` is for the operator's eyes."""

    action: Action
    folder: Folder
    reason: str
    request: Request | None = None
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.folder.holder.value}: {self.action.value}: {self.reason}"


def plan(
    authority: Finding, wanted: Sequence[tuple[Request, Finding]], renew: Set[Holder] = frozenset()
) -> list[Step]:
    """Return the steps, the CA's first."""
    first = _authority_step(authority, renew)
    new_authority = first.action in (Action.CREATE, Action.REPLACE)
    steps = [_step(request, finding, renew, new_authority) for request, finding in wanted]
    if authority.condition is Condition.PUBLIC_ONLY and any(step.action.signs for step in steps):
        first = replace(
            first,
            action=Action.REFUSE,
            reason=f"{authority.detail}, and it is needed to sign (run this where the CA's key is)",
        )
    return [first, *steps]


def refusals(steps: Sequence[Step]) -> list[str]:
    """Return the reasons for which nothing may be done."""
    return [step.reason for step in steps if step.action is Action.REFUSE]


def _authority_step(finding: Finding, renew: Set[Holder]) -> Step:
    folder = finding.folder
    if finding.condition is Condition.ABSENT:
        return Step(Action.CREATE, folder, "there is no CA yet")
    if Holder.AUTHORITY in renew:
        return Step(Action.REPLACE, folder, "asked for: every other certificate must be replaced, too")
    if finding.condition in (Condition.BROKEN, Condition.KEY_ONLY):
        hint = " (restore it from a backup)" if finding.condition is Condition.KEY_ONLY else ""
        return Step(Action.REFUSE, folder, finding.detail + hint)
    return _kept(finding, None)


def _step(request: Request, finding: Finding, renew: Set[Holder], new_authority: bool) -> Step:
    folder = finding.folder
    if finding.condition is Condition.ABSENT:
        return Step(Action.CREATE, folder, f"{request.common_name} has none yet", request)
    if request.holder in renew:
        return Step(Action.REPLACE, folder, "asked for", request)
    if finding.condition is Condition.BROKEN:
        return Step(Action.REFUSE, folder, finding.detail, request)
    if finding.condition is Condition.KEY_ONLY:
        return Step(Action.CERTIFY, folder, f"{folder.key} has no certificate", request)
    if new_authority:
        reason = f"{folder.certificate} was signed by another CA than the new one (use --renew)"
        return Step(Action.REFUSE, folder, reason, request)
    return _changed(request, finding) or _kept(finding, request)


def _changed(request: Request, finding: Finding) -> Step | None:
    """Return a step when the certificate is good, but not the one that is wanted."""
    folder, summary = finding.folder, finding.summary
    assert summary is not None, "only broken and absent findings have no summary"
    if request.holder is Holder.ETCD:
        lacking = _lacking(request, summary)
        if lacking:
            return Step(Action.CERTIFY, folder, f"{folder.certificate} lacks {', '.join(lacking)}", request)
    elif summary.common_name != request.common_name:
        reason = (
            f"{folder.certificate} is for {summary.common_name}, not for {request.common_name} "
            "(use --renew, or issue into another folder)"
        )
        return Step(Action.REFUSE, folder, reason, request)
    return None


def _lacking(request: Request, summary: Summary) -> list[str]:
    wanted = {str(name.value) for name in request.alternatives}
    own = [] if summary.common_name == request.common_name else [request.common_name]
    return own + sorted(wanted - summary.names)


def _kept(finding: Finding, request: Request | None) -> Step:
    if finding.condition is Condition.EXPIRING:
        reason = f"{finding.detail} (issue a new one with --renew)"
        return Step(Action.KEEP, finding.folder, reason, request, warning=True)
    if not finding.has_authority:
        return Step(Action.COPY, finding.folder, f"{finding.folder.authority} is not our CA's", request)
    end = f"valid until {finding.summary.not_after:%Y-%m-%d}" if finding.summary else ""
    return Step(Action.KEEP, finding.folder, end, request)
