"""What a variant of the reader's self-attention is: its config, and how it counts updates where
it has a schedule."""

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
    """Whether what is trained is made for a number of positions, and reads no longer texts."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "dense"

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        """The module that takes the place of BERT's self-attention in layer number `layer` (0 is
        the lowest)."""
        raise TypeError(f"{type(self).__name__} does not say how it replaces a self-attention module")

    def replace_all(self, attentions: Sequence[nn.Module]) -> list[nn.Module]:
        """The modules that take the place of all layers' self-attention, lowest first."""
        return [self.replace(attention, layer) for layer, attention in enumerate(attentions)]


class CountsUpdates(ABC):
    """A self-attention module with a schedule of its own."""

    @abstractmethod
    def count_update(self) -> None:
        """Called after each update of the parameters, between two forwards."""


def count_update(model: nn.Module) -> None:
    """Tell the attentions of `model` that its parameters were updated; every training loop is to
    call this after the optimizer's step."""
    for module in model.modules():
        if isinstance(module, CountsUpdates):
            module.count_update()
