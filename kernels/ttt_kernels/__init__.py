"""GPU kernels for the TTT inner loop. Depends on jax alone.

`SUPPORTED` names the operations that have a kernel; it is empty until the first kernel lands.
"""

SUPPORTED: frozenset[str] = frozenset()
