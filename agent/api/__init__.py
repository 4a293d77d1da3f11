# SPDX-License-Identifier: Apache-2.0
"""The agent's REST API on a unix socket: small handlers over an `AgentView`.

Responsible for: routes and their JSON (`models`), what the handlers need of the agent (`view`), errors as
HTTP codes (`errors`), the stream of datapath events to any number of readers (`monitor`), metrics.

Called by: the agent's composition root (`server.serve`); spoken to by `cli/` and by anything that speaks
HTTP.  May import: core, and the error roots of the libraries.
"""
