"""Base class of attention configs, and the hook for modules that depend on the number of parameter
updates."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import draccus
from torch import nn


@dataclass(frozen=True)
class AttentionConfig(draccus.ChoiceRegistry):
    """Base of all variants."""

    fixed_length: ClassVar[bool] = False
    """Whether the maximum number of positions is fixed by the trained parameters."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "dense"

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        """The module that replaces BERT's self-attention in layer number `layer` (0 is the
        lowest)."""
        raise TypeError(f"{type(self).__name__} must implement replace() or replace_all()")

    def replace_all(self, attentions: Sequence[nn.Module]) -> list[nn.Module]:
        """The modules that replace the self-attention of all layers, lowest first."""
        return [self.replace(attention, layer) for layer, attention in enumerate(attentions)]


class CountsUpdates(ABC):
    """A self-attention module with a schedule in parameter updates."""

    @abstractmethod
    def count_update(self) -> None:
        """Called after each parameter update, between two forward passes."""


def count_update(model: nn.Module) -> None:
    """Notify the attention modules of `model` of a parameter update; every training loop must call
    this after the optimizer step."""
    for module in model.modules():
        if isinstance(module, CountsUpdates):
            module.count_update()
