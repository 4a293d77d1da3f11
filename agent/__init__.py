# SPDX-License-Identifier: Apache-2.0
"""The per-host daemon: wires the libraries together and owns the host's kernel state.

`main` is the composition root.  `endpoints` keeps the endpoints, `driver` serves the engine's network
driver protocol, `engine` talks to the engine, `plumbing` and its siblings are the reconcilers' targets,
`api` serves the CLI.

Called by: the start hook and `holdfast agent`.  May import: every library; no library imports it.
"""
