# SPDX-License-Identifier: Apache-2.0
"""Identities: from labels to one number that the whole cluster agrees on.

Responsible for: labels and their serialized form (`labels`), which labels make the identity
(`filter`), number ranges (`numbers`), numbers of address prefixes on this host (`local`), what is
known (`cache`), allocation in etcd (`allocator`), and the cluster's housekeeping by whoever is
elected: garbage collection (`gc`) and the heartbeat (`heartbeat`).

Called by: agent, policy (labels and numbers only), external_resources, controlplane, cli.
May import: core, kvstore.
"""
