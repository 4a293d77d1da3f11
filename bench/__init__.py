# SPDX-License-Identifier: Apache-2.0
"""Every benchmark: one module a subject, each prints its figures as JSON lines.

How each figure is taken stands in the module that takes it.  Called by `make bench`.
May import: everything.
"""
