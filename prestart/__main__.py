# SPDX-License-Identifier: Apache-2.0
"""`python3 -S -E <path of this file>` from anywhere, or `python3 -S -E -m prestart`, which is slower.

Without site-packages (-S, which saves half of the start) the first form knows only this folder: the one
around it, where `core` lies too, is added behind the standard library.
"""

import os
import sys

if not __package__:
    # Replaces this folder itself, whose modules must not be found as top-level ones.
    sys.path[0:1] = []
    sys.path.append(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from prestart.main import main

if __name__ == "__main__":
    sys.exit(main())
