# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on the kernel's data path."""

from __future__ import annotations

import pytest

from tests.support.families import NETS, Net


@pytest.fixture(scope="module", params=NETS, ids=["ipv4", "ipv6"])
def net(request: pytest.FixtureRequest) -> Net:
    """Each address family in turn."""
    made: Net = request.param
    return made
