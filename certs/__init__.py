# SPDX-License-Identifier: Apache-2.0
"""Certificates: one CA, one certificate per agent, etcd member and operator, and etcd.config files.

    authority   makes the CA                        issue     makes everybody else's certificate
    layout      which file lies where               material  reads and writes one key or certificate
    inspect     what is there and in what state     plan      what has to be done about it (pure)
    apply       does it                             commands  `python -m certs`, also `make up`'s way in
    inventory   the machines of a fleet             fleet     a complete folder for each of them

Called by `make up`, the command line and tests.  May import `core` and, for etcd's users and roles,
`kvstore`.
Private keys never leave the files they are written to: no log, error or listing shows one.
"""
