# SPDX-License-Identifier: Apache-2.0
"""`python -m certs`: see `certs.commands`."""

from certs.commands import main

if __name__ == "__main__":
    main()
