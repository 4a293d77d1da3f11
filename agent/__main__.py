# SPDX-License-Identifier: Apache-2.0
"""`python -m agent`."""

import sys

from agent.start import main

sys.exit(main())
