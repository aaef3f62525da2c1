"""Precision of forward passes: its names in configs, and the autocast context."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
"""fp32, or bf16: matrix products in bfloat16, parameters in fp32."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Autocast context for forward passes on `device` in `precision`, as in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
