# SPDX-License-Identifier: Apache-2.0
"""etcd: the client, the session, watching, election, and the schema.

    config ──▶ transport ──▶ client ──▶ session (lease, own keys) ──▶ election
                                    └─▶ watcher (list, watch, resume) ──▶ sink ──▶ core.table
    schema: every key and record, built and parsed in one place, byte for byte as Cilium 1.11 has them

Responsible for: talking to etcd with patience (failover, back-off, hang detection, resume), keeping this
process's own keys alive, delivering other people's keys to tables, and the formats of all of them.

Called by: agent, identity, certs, external_resources, cli, bench.  May import: core.
"""
