# SPDX-License-Identifier: Apache-2.0
"""`python -m agent`."""

import sys

from agent.main import main

sys.exit(main())
