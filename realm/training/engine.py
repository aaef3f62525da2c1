"""DeepSpeed as the one training engine, and the loop that every stage shares: step, log,
checkpoint, resume, interrupt."""

import contextlib
import copy
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from realm.attention import count_update
from realm.errors import UserError
from realm.runtime.distributed import (
    any_rank,
    barrier,
    is_rank_zero,
    local_device,
    mean_over_ranks,
    on_rank_zero,
    rank,
    world_size,
)
from realm.runtime.nested import merge
from realm.runtime.publish import published
from realm.runtime.telemetry import Metrics, console, peak_memory, progress
from realm.training.sections import EngineConfig, OptimConfig

CHECKPOINT_STATE = "state.json"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the checkpoint is written, the same command goes on from it."""


def optimizer_groups(
    module: nn.Module, optim: OptimConfig, retriever_prefix: str = "retriever."
) -> list[dict[str, Any]]:
    """AdamW parameter groups: retriever or not, with decay or (biases, norms) without; frozen
    and repeated parameters left out."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            lr = optim.lr if optim.retriever_lr is None or not name.startswith(retriever_prefix) else optim.retriever_lr
            decay = optim.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]


def schedule(optim: OptimConfig, steps: int) -> Callable[[int], float]:
    """Factor on the peak rate at each step."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, optim.warmup_steps))
        if optim.schedule == "constant":
            return rise
        left = max(0.0, (steps - step) / max(1, steps - optim.warmup_steps))
        return min(rise, optim.final_lr_ratio + (1 - optim.final_lr_ratio) * min(1.0, left))

    return factor


class Engine:
    """A module under DeepSpeed: `step(batch)` runs forward, backward and update once.

    `read_between` are parts of it that are also called between steps (see `gathered_copy`).
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        config: EngineConfig,
        steps: int,
        batch_size: int,
        read_between: Sequence[nn.Module] = (),
    ) -> None:
        deepspeed = start_processes()
        if config.threads:
            torch.set_num_threads(config.threads)
        optimizer = torch.optim.AdamW(optimizer_groups(module, optim), betas=optim.betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(optim, steps))
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": optim.max_grad_norm,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if config.precision == "bf16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            if is_rank_zero() and not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                console.print(
                    "  warning: this CPU has no bf16 arithmetic and emulates it, many times slower; set engine.precision to fp32"
                )
        for name, remedy in (
            ("gradient_accumulation_steps", "batch_size of the stage"),
            ("train_batch_size", "batch_size of the stage"),
            ("train_micro_batch_size_per_gpu", "batch_size of the stage"),
            ("optimizer", "optim of the stage"),
            ("scheduler", "optim of the stage"),
        ):
            if name in config.deepspeed:
                raise UserError(f"engine.deepspeed.{name} would not be followed; set {remedy} instead.")
        settings = merge(settings, config.deepspeed)
        partitioned = (settings["zero_optimization"] or {}).get("stage") == 3
        self._copies = {part: copy.deepcopy(part) for part in read_between} if partitioned else {}
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, lr_scheduler=scheduler, config=settings
            )
        except (ValueError, AssertionError, KeyError) as error:
            raise UserError(f"engine.deepspeed was refused by DeepSpeed ({error}); check the raw settings.") from error
        self.module = module

    @property
    def device(self) -> torch.device:
        """Where batches must lie."""
        return self.deepspeed.device

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage: 3 parts the parameters too."""
        return self.deepspeed.zero_optimization_stage()

    def gathered(self, *modules: nn.Module) -> contextlib.AbstractContextManager[object]:
        """Inside, the modules' parameters are whole on every rank, to be read; all ranks must
        enter."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter for module in modules for parameter in module.parameters()])

    def gathered_copy(self, part: nn.Module) -> nn.Module:
        """`part`, one of `read_between`, to be called between two steps; all ranks must call this.

        ZeRO 3 gathers parameters by the order of a step's calls, and is confused by others: it is
        answered with an up-to-date copy.
        """
        if part not in self._copies:
            return part
        plain = self._copies[part].to(self.device)
        with self.gathered(part), torch.no_grad():
            for mine, theirs in zip(plain.parameters(), part.parameters(), strict=True):
                mine.copy_(theirs)
        return plain

    def step(self, batch: Any) -> dict[str, float]:
        """One update; returns the module's scalars, `loss` among them."""
        self.deepspeed.train()
        outputs: dict[str, Tensor] = self.deepspeed(batch)
        self.deepspeed.backward(outputs["loss"])
        self.deepspeed.step()
        count_update(self.module)
        return {name: float(value.detach()) for name, value in outputs.items()}

    def save(
        self, folder: Path, step: int, state: dict[str, Any], write_extra: Callable[[Path], None] | None = None
    ) -> None:
        """Publish `folder` (a checkpoint) atomically: DeepSpeed's state, `state.json`, and
        whatever `write_extra(temporary)` adds on each rank."""
        with contextlib.ExitStack() as context:
            temporary = on_rank_zero(lambda: context.enter_context(published(folder)))
            self._write(temporary, step, state, write_extra)
            barrier()
        barrier()

    def _write(
        self, temporary: Path, step: int, state: dict[str, Any], write_extra: Callable[[Path], None] | None
    ) -> None:
        self.deepspeed.save_checkpoint(str(temporary), tag="deepspeed")
        if is_rank_zero():
            (temporary / CHECKPOINT_STATE).write_text(
                json.dumps({"step": step, "world_size": world_size(), **state}, indent=1)
            )
        if write_extra is not None:
            write_extra(temporary)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore weights, optimizer and schedule; returns the saved state. Raises UserError for
        another number of processes."""
        state = read_state(folder)
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise UserError(f"{folder} holds no DeepSpeed state; remove it to resume from an older checkpoint.")
        return state


def newest_checkpoint(stage: Path) -> Path | None:
    """The newest published checkpoint of a stage's folder."""
    found = checkpoints(stage)
    return found[-1] if found else None


def checkpoints(stage: Path) -> list[Path]:
    """The published checkpoints of a stage's folder, oldest first."""
    return sorted((stage / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises UserError where it was written by another number
    of processes."""
    state = json.loads((checkpoint / CHECKPOINT_STATE).read_text())
    if state["world_size"] != world_size():
        written, now = state["world_size"], world_size()
        raise UserError(
            f"{checkpoint} was written by {written} processes and this run has {now}; resume with {written}."
        )
    return state


class Loop:
    """Runs a stage: override nothing, pass functions.

    `make_batch(step)` must depend on the step and the seed alone (or restore what else it needs
    through `state` and `on_resume`), so that a resumed stage sees the batches it would have seen.
    """

    def __init__(
        self,
        engine: Engine,
        stage: Path,
        title: str,
        steps: int,
        checkpoint_every: int,
        config: EngineConfig,
        seed: int,
    ) -> None:
        self.engine, self.stage, self.title, self.steps = engine, stage, title, steps
        self.checkpoint_every, self.config, self.seed = checkpoint_every, config, seed

    def resume(self) -> tuple[int, dict[str, Any], Path | None]:
        """Load the newest checkpoint: the step to go on with, its state, its folder."""
        folder = newest_checkpoint(self.stage)
        if folder is None:
            return 0, {}, None
        state = self.engine.load(folder)
        return state["step"], state, folder

    def run(
        self,
        start: int,
        make_batch: Callable[[int], Any],
        metrics: Metrics,
        note: Callable[[dict[str, float]], str],
        after_step: Callable[[int], dict[str, float | str]] = lambda step: {},
        state: Callable[[], dict[str, Any]] = dict,
        write_extra: Callable[[Path], None] | None = None,
        seconds_before: float = 0.0,
    ) -> float:
        """Train from step `start` to the end; returns the seconds the stage has trained, earlier
        attempts included.

        After Ctrl-C or SIGTERM the running step is finished, a checkpoint written and Interrupted
        raised.
        """
        began = time.monotonic()

        def save(step: int) -> None:
            seconds = seconds_before + time.monotonic() - began
            self.engine.save(
                self.stage / "checkpoints" / f"step-{step:06d}", step, {"seconds": seconds, **state()}, write_extra
            )
            if is_rank_zero():
                for old in checkpoints(self.stage)[: -self.config.keep_checkpoints]:
                    shutil.rmtree(old)

        with stop_signals() as stop, progress(self.title, self.steps, start, every_s=self.config.log_every_s) as ticker:
            for step in range(start, self.steps):
                # Dropout depends on the step alone: a resumed run needs no generator state.
                torch.manual_seed((self.seed * 1_000_003 + step) * 4099 + rank())
                before = time.monotonic()
                batch = make_batch(step)
                made = time.monotonic()
                values: dict[str, Any] = mean_over_ranks(self.engine.step(batch))
                values |= {"seconds/batch": made - before, "seconds/update": time.monotonic() - made}
                values |= after_step(step + 1)
                metrics.log(step + 1, values | {"seconds/step": time.monotonic() - before} | peak_memory())
                ticker.update(step + 1, note(values))
                interrupted = any_rank(stop.is_set())
                if interrupted or ((step + 1) % self.checkpoint_every == 0 and step + 1 < self.steps):
                    save(step + 1)
                if interrupted:
                    raise Interrupted(
                        f"{self.title} was interrupted at step {step + 1} of {self.steps}; the same command with --resume goes on."
                    )
        return seconds_before + time.monotonic() - began


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM instead of an exception in the middle of a step."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start_processes() -> Any:
    """Import DeepSpeed quietly and set up its process group, once; returns the package."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())  # DeepSpeed does so later, and much is placed before
    if not dist.is_initialized() and world_size() == 1 and "MASTER_ADDR" not in os.environ:
        # A world of one has nobody to share memory with: no need to compile DeepSpeed's
        # shared-memory collectives first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    return deepspeed
