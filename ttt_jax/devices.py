"""What the device that computes can do."""

import re
from typing import Any

import jax


def default_device() -> Any:
    """The `jax.Device` that computes what is placed nowhere else."""
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def compute_capability() -> tuple[int, ...] | None:
    """Of the default device, such as (9, 0); None if that is no CUDA GPU."""
    device = default_device()
    # Not by the client's platform: a device that is only compiled for has none.
    capability = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return None if capability is None else tuple(map(int, capability.groups()))
