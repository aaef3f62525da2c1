"""Full softmax attention through torch's `scaled_dot_product_attention`: the yardstick of every other variant."""

from dataclasses import dataclass

from torch import nn

from realm.attention import AttentionConfig


@AttentionConfig.register_subclass("dense")
@dataclass(frozen=True)
class DenseAttention(AttentionConfig):
    """Every token attends to every token; time and (without a fused kernel) memory grow with the square of the length."""

    def replace(self, attention: nn.Module, layer: int) -> nn.Module:
        """BERT's own module, dispatched to the fused kernel, is the implementation."""
        return attention
