# SPDX-License-Identifier: Apache-2.0
"""The mechanism every other part is built from.

Responsible for: tables of desired state (`table`), reconcilers that make the kernel or the kvstore
equal to a table (`reconciler`), back-off and jittered intervals (`backoff`), the option table
(`options`), the error root (`errors`), supervision of long-running tasks (`supervisor`), the register
of what is being waited for (`waiting`), the event loop and its pauses (`loop`), atomic private files
(`files`), metrics (`metrics`) and logging (`log`).

Called by: every other package.  May import: nothing of Holdfast.
"""
