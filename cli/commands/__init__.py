# SPDX-License-Identifier: Apache-2.0
"""One module for each command of `holdfast`; `cli.main` imports the one that is asked for."""
