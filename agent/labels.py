# SPDX-License-Identifier: Apache-2.0
"""From a container's labels to those that make its identity.  Pure."""

from __future__ import annotations

from collections.abc import Mapping

from loguru import logger

from agent.errors import EndpointRefused
from core.errors import shorten
from identity.errors import LabelError
from identity.filter import LabelFilter
from identity.labels import CONTAINER, Labels
from policy.names import check_port_labels

# Ours alone: a container can not give itself another network's name.  With it, one without labels of its
# own has an identity too.
NETWORK_LABEL = "holdfast.network"


def container_labels(
    chosen: LabelFilter, name: str, labels: Mapping[str, str], network: str
) -> tuple[Labels, Labels]:
    """Return (all labels, identity labels) of container `name`.

    Raises EndpointRefused for a malformed label that would count; one that would not is ignored.
    """
    given = {key: value for key, value in labels.items() if key != NETWORK_LABEL}
    try:
        selection = chosen.select({**given, NETWORK_LABEL: network}, source=CONTAINER)
        check_port_labels(selection.identity)
    except LabelError as error:
        raise EndpointRefused(
            f"container {shorten(name)} has a label that can not be part of an identity: {error}",
            hint="it stays denied; start it again without that label",
        ) from error
    if selection.unusable:
        logger.warning("container {}: labels {} ignored", shorten(name), ", ".join(selection.unusable))
    return selection.identity.union(selection.info), selection.identity
