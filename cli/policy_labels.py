# SPDX-License-Identifier: Apache-2.0
"""Policies chosen by the labels of their rules, as `cilium policy delete LABELS` chose rules.

What is deleted here is a whole policy, which has one name and one text, so all of its rules must have the
labels.  Called by `holdfast policy delete`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

from cli.errors import CliError, Missing
from cli.output import printable
from core.errors import HoldfastError
from identity.errors import LabelError
from identity.labels import ANY, Label, parse_label
from policy.language import parse_policies
from policy.model import Rule

Json = dict[str, Any]


def named_by_labels(policies: Iterable[Json], texts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the policies all of whose rules have every label of `texts`.

    A label without a source is meant with any.  Raises CliError for a policy of which only some rules have
    them, Missing when there is none, UsageError for a text that is no label.
    """
    wanted = [_label(text) for text in texts]
    found: list[str] = []
    for policy in policies:
        having = [_has_all(rule, wanted) for rule in _rules(policy)]
        if any(having) and not all(having):
            raise CliError(
                f"{having.count(True)} of the {len(having)} rules of policy {policy['name']} have the labels "
                f"{', '.join(texts)}; nothing was deleted",
                hint="apply the policy without those rules, or delete it by its name",
            )
        found += [policy["name"]] if any(having) else []
    if not found:
        raise Missing(f"no policy has the labels {', '.join(map(printable, texts))}")
    return tuple(found)


def _label(text: str) -> Label:
    try:
        return parse_label(text, default_source=ANY)
    except LabelError as error:
        raise click.BadParameter(str(error), param_hint="--label") from error


def _rules(policy: Json) -> tuple[Rule, ...]:
    document, name = policy["document"], policy["name"]
    text = document if isinstance(document, str) else json.dumps(document)
    try:
        return tuple(rule for each in parse_policies(text, name, name=name) for rule in each.rules)
    except HoldfastError as error:
        click.echo(f"{printable(name)} is left as it is, its rules can not be read: {error}", err=True)
        return ()


def _has_all(rule: Rule, wanted: Iterable[Label]) -> bool:
    return all(any(_is(each, label) for label in rule.labels) for each in wanted)


def _is(wanted: Label, label: Label) -> bool:
    same_source = wanted.source in (ANY, label.source)
    return same_source and (wanted.key, wanted.value) == (label.key, label.value)
