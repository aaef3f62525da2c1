"""Two trainer processes under DeepSpeed's launcher: swaps, checkpoints, resume, ZeRO 1 to 3."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from realm.runtime.telemetry import read_metrics
from realm.training.engine import Engine
from realm.training.sections import EngineConfig, StageConfig
from tests.realm.runtime.test_distributed import on_two_ranks
from tests.tiny import write_config, write_sources

ROOT = Path(__file__).resolve().parents[1]
TWO_RANKS = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(program: str, *arguments: object) -> list[str]:
    """Command line of a training program with two processes, as users start it with `deepspeed`."""
    return [
        sys.executable,
        *TWO_RANKS,
        "--master_port",
        str(free_port()),
        "--module",
        "realm",
        program,
        *map(str, arguments),
    ]


def run(arguments: Sequence[str], timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def prepared(folder: Path, **changes: dict) -> Path:
    write_sources(folder)
    config = write_config(folder, **changes)
    done = run([sys.executable, "-m", "realm", "prepare", "--config", str(config)])
    assert done.returncode == 0, done.stderr
    return config


def rows(folder: Path) -> list[dict]:
    return read_metrics(folder / "run" / "metrics.jsonl")["pretrain"]


@pytest.mark.timeout(600)
def test_two_ranks_swap_at_the_same_step_and_resume_after_a_kill(tmp_path: Path) -> None:
    zero_1 = {"threads": 1, "deepspeed": {"zero_optimization": {"stage": 1}}}
    follow = {"export_every": 10, "max_stale_steps": 25, "stale_policy": "wait"}
    config = prepared(tmp_path, pretrain={"steps": 60, "checkpoint_every": 5}, engine=zero_1, refresh=follow)
    trainer = command("pretrain", "--config", config, "--with-refresher")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        trainer,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    checkpoints = tmp_path / "run" / "pretrain" / "checkpoints"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(list(checkpoints.glob("step-*"))) < 1 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert list(checkpoints.glob("step-*")), output

    newest = sorted(checkpoints.glob("step-*"))[-1]
    assert len(list(newest.glob("candidates-*.npy"))) == 2, "the checkpoint contains each rank's pending candidates"

    alone = run([sys.executable, "-m", "realm", "pretrain", "--config", str(config), "--resume"])
    assert alone.returncode == 2 and "written by 2 processes" in alone.stderr and "Traceback" not in alone.stderr

    resumed = run(command("pretrain", "--config", config, "--with-refresher", "--resume"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    lineage = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert [entry["attempt"] for entry in lineage] == [1, 2], "all ranks have the same attempt"
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 61))
    assert rows(tmp_path)[-1]["swaps"] >= 1 and max(row["steps_behind"] for row in rows(tmp_path)) <= 26
    assert (tmp_path / "run" / "pretrain" / "model" / "reader" / "model.safetensors").exists()
    assert resumed.stdout.count("pretrain: 60/60") == 1, "only rank 0 prints"


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero",
    [{"stage": 2}, {"stage": 3}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}],
    ids=["ZeRO 2", "ZeRO 3", "offload"],
)
def test_partitioned_optimizers_gradients_and_parameters(tmp_path: Path, zero: dict) -> None:
    config = prepared(tmp_path, engine={"threads": 1, "deepspeed": {"zero_optimization": zero}})
    trained = run(command("pretrain", "--config", config, "--with-refresher"))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert len(rows(tmp_path)) == 8
    from realm.models.retriever_files import load_retriever

    retriever, _ = load_retriever(tmp_path / "run" / "pretrain" / "model" / "retriever")
    assert all(parameter.numel() > 0 for parameter in retriever.parameters()), "saved parameters are complete"


def test_raw_settings_are_merged_unless_they_would_be_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = prepared(tmp_path)
    refused = run(
        [
            sys.executable,
            "-m",
            "realm",
            "ict",
            "--config",
            str(config),
            "--engine.deepspeed",
            "{gradient_accumulation_steps: 2}",
        ]
    )
    assert (
        refused.returncode == 2
        and "gradient_accumulation_steps" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    problems = list(EngineConfig(deepspeed={"optimizer": {"type": "Lamb"}}).problems())
    assert problems == ["deepspeed.optimizer would be ignored; set optim of the stage instead"]
    given = {}
    monkeypatch.setattr("deepspeed.initialize", lambda **arguments: given.update(arguments["config"]) or (None,))
    Engine(
        nn.Linear(2, 2),
        StageConfig(),
        EngineConfig(precision="bf16", deepspeed={"torch_autocast": {"dtype": "float16"}}),
    )
    assert given["torch_autocast"] == {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}


_TWO_RANKS = """
import sys
from pathlib import Path

import torch
from torch import nn

from realm.runtime.distributed import rank
from realm.training.engine import Engine
from realm.training.sections import EngineConfig, OptimConfig, StageConfig


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)

    def forward(self, batch):
        return {"loss": self.linear(batch).float().sum()}


config = EngineConfig(precision="bf16", deepspeed={"zero_optimization": {"stage": int(sys.argv[1])}})
engine = Engine(Model(), StageConfig(batch_size=1, optim=OptimConfig(max_grad_norm=0.0)), config)
gradients = []
engine.deepspeed.optimizer.step = lambda *_: gradients.extend(
    part for parts in engine.deepspeed.optimizer.averaged_gradients.values() for part in parts
)
engine.deepspeed.train()
# The ranks' gradients are 256 and 1; their sum, 257, is not a bf16 number.
engine.deepspeed.backward(engine.deepspeed(torch.full((1, 2), 256.0 if rank() == 0 else 1.0))["loss"])
engine.deepspeed.step()
print(gradients[0].flatten().tolist())


def full_disk(folder):
    if rank() == int(sys.argv[2]):
        raise OSError(28, "No space left on device")


try:
    engine.save(Path(sys.argv[3]) / "step-000001", {"step": 1}, full_disk)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_gradients_are_summed_in_fp32_and_a_failed_checkpoint_ends_every_rank(tmp_path: Path) -> None:
    ranks = on_two_ranks(_TWO_RANKS, 1, 0, tmp_path)
    assert all(rank.returncode == 0 for rank in ranks), ranks[0].stderr + ranks[1].stderr
    outputs = [rank.stdout.splitlines() for rank in ranks]
    assert outputs[0][-2] == "[128.5, 128.5]", "the mean; rank 0 has the only parameter's partition"
    assert outputs[0][-1] == "OSError [Errno 28] No space left on device"
    assert outputs[1][-1] == "UserError rank 0 failed with OSError: [Errno 28] No space left on device"
    assert not list(tmp_path.iterdir()), "nothing is left of the checkpoint"
