# SPDX-License-Identifier: Apache-2.0
"""The start hook: spreads the starts of a fleet over a window, then becomes the agent.

It is the entrypoint of the agent's container (``… prestart [--flags] -- COMMAND…``), so that every
start passes through it: a crash, `docker restart`, a restart of the engine, a reboot.  It asks nothing
central: node count and names come from a small file that the agent leaves beside its checkpoint.

Called by the container's engine; the agent reads `prestart.handover` and writes `prestart.cluster`; the
command line and the benches ask `prestart.simulation` what it does to a fleet (the hook never loads it).
May import the standard library and `core.errors` and `core.files` (which import nothing else), because it
has to start in 50 ms and 15 MB on a host that is busy booting; `simulation` also `core.backoff`.  What the
standard library loads for a module counts too: no `pathlib`, no `typing` (`prestart.values`).
"""
