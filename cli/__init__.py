# SPDX-License-Identifier: Apache-2.0
"""The `holdfast` command: thin, talks to the agent's socket, to etcd, to the engine or to pinned maps.

Responsible for: the tree of commands (`main`), one module a command (`commands`), the agent's socket
(`client`), tables and JSON (`output`), exit codes (`errors`).  Nothing is imported before the command that
needs it: a `holdfast status` is faster than a tenth of a second.

Called by: people, `make`, health checks.  May import: the libraries, lazily; of the agent only its option
table and its `main`.
"""
