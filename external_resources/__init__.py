# SPDX-License-Identifier: Apache-2.0
"""External resources: VMs and bare-metal machines that join the identity model without an agent on them.

    record ──▶ derived keys (pure) ──▶ one owner per address ──▶ etcd

Responsible for: what a resource is and which keys follow from it (`resource`), and writing, removing and
listing them in etcd so that a repetition changes nothing and a crash in the middle is completed by the
next call (`registry`).

Called by: cli (`holdfast vm …`), the API server and inventory sources.  May import: core, kvstore,
identity.
"""
