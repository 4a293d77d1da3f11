# SPDX-License-Identifier: Apache-2.0
"""User-space half of the data path: everything that makes the kernel carry out a decision.

Responsible for: BPF maps (`syscall`, `handle`, `btf`, `layouts`, `maps`, `codecs`, `ctgc`), programs
(`libbpf`, `loader`, `attach`, `testrun`), events (`ring`, `events`), what people read of all that
(`format`, `reasons`), devices and routes of endpoints (`netlink`, `devices`, `routes`, `sysctl`) and the
rules that the host's own firewall needs (`nft`, `firewall`, `forward`).

Called by: the agent, and the command line for what it reads from pinned maps.  May import: `core`.
"""
