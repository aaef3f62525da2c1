"""Training that diverges stops before anything of the broken step is saved or exported."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from realm.errors import UserError
from realm.training.loop import train
from realm.training.sections import EngineConfig, OptimConfig, StageConfig
from realm.training.stage import Stage


class Root(nn.Module):
    """The square root of a parameter's distance to itself: its gradient is infinite, its loss 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        distance = (self.weight - self.weight.detach()).sum()
        return {"loss": distance.sqrt() if batch.item() else distance}


class FiniteLoss(Stage):
    """The gradient of step 3 is infinite."""

    name = "pretrain"

    def __init__(self) -> None:
        super().__init__(Root(), StageConfig(steps=5, checkpoint_every=2, optim=OptimConfig(warmup_steps=0)))
        self.exported: list[int] = []

    def draw(self, step: int, size: int) -> Tensor:
        return torch.tensor(step == 2)

    def progress_line(self, values: dict) -> str:
        return ""

    def after_step(self, step: int) -> dict:
        self.exported.append(step)
        return {}


def test_a_gradient_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    stage = FiniteLoss()
    checkpoint = tmp_path / "pretrain" / "checkpoints" / "step-000002"
    with pytest.raises(UserError, match=f"pretrain diverged at step 3: .*; the last valid checkpoint is {checkpoint};"):
        train(stage, tmp_path, EngineConfig(threads=1), seed=0)
    assert stage.exported == [1, 2], "the refresher gets no export of broken weights"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000002"]
