"""Arithmetic of forward passes: one name for each precision, one autocast."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
"""fp32, or bf16: matrix products in bfloat16 over parameters that stay fp32."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Context in which forward passes on `device` compute in `precision`, as training does."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
