# SPDX-License-Identifier: Apache-2.0
"""Policy: from documents that people write to the entries of an endpoint's policy map.

    text ──▶ document ──▶ language ──▶ Policy ──▶ engine ──▶ MapChange per endpoint
             (limits)     (fields, peers, ports)   (selectors, resolution)

Responsible for: the policy language (`language`, and the table of its fields in `fields`), which
identities a selector selects (`selectors`, `index`), what requirements and names of ports make of a clause
for one endpoint (`narrowing`, `names`), which entries that makes (`resolve`) and what changes when a rule,
an identity or an endpoint comes or goes (`engine`, the one facade).

Pure and synchronous: no I/O, no clock, no task.  Not safe for several threads at once.
Called by: agent, cli (validate), controlplane, bench.  May import: core, identity.
"""
