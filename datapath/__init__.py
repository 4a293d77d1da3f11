# SPDX-License-Identifier: Apache-2.0
"""User-space half of the data path: everything that makes the kernel carry out a decision.

Responsible for:

* BPF maps: `syscall` and `uapi` (bpf(2)), `handle` (one map in bytes), `layouts`, `btf`, `mapspec` (which
  maps there are), `records` and `maps` (typed), `ctgc` (conntrack collection), `bpffs`;
* programs: `libbpf`, `constants`, `loader`, `attach`, `testrun`;
* events: `ring`, `events` (decoded), `packets`, `reasons`, `format` (Cilium's monitor lines);
* devices and routes of endpoints: `netlink`, `namespace`, `devices`, `routes`, `sysctl`;
* the host's own firewall: `command`, `firewall` and `nftlist` (nft), `forward` (iptables), `rulewatch`
  (changes by others), `hostflows` (netfilter's flows).

Called by: the agent, and the command line for what it reads from pinned maps.  May import: `core`.
"""
