"""DeepSpeed, the only training engine: optimizer, learning rate schedule, one step, checkpoints."""

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from realm.attention import count_update
from realm.errors import UserError
from realm.runtime.distributed import (
    is_rank_zero,
    local_device,
    on_all_ranks,
    on_rank_zero,
    world_size,
)
from realm.runtime.nested import merge
from realm.runtime.publish import published
from realm.runtime.telemetry import console
from realm.training.checkpoints import read_state, write_state
from realm.training.deepspeed_settings import import_deepspeed
from realm.training.sections import EngineConfig, OptimConfig, StageConfig

_DEEPSPEED_TAG = "deepspeed"


def optimizer_groups(
    module: nn.Module, optim: OptimConfig, retriever_prefix: str = "retriever."
) -> list[dict[str, Any]]:
    """AdamW parameter groups by learning rate (retriever or not) and weight decay.

    Biases and norms have no weight decay. Frozen parameters are skipped, shared ones occur once.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            lr = optim.lr if optim.retriever_lr is None or not name.startswith(retriever_prefix) else optim.retriever_lr
            decay = optim.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]


def schedule(optim: OptimConfig, steps: int) -> Callable[[int], float]:
    """Function that maps a step to the factor on the peak learning rate."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, optim.warmup_steps))
        if optim.schedule == "constant":
            return rise
        left = max(0.0, (steps - step) / max(1, steps - optim.warmup_steps))
        return min(rise, optim.final_lr_ratio + (1 - optim.final_lr_ratio) * min(1.0, left))

    return factor


class Engine:
    """A module under DeepSpeed: `step(batch)` runs forward, backward and update once."""

    def __init__(
        self,
        module: nn.Module,
        stage: StageConfig,
        config: EngineConfig,
        modules_called_between_steps: Sequence[nn.Module] = (),
    ) -> None:
        """`modules_called_between_steps`: parts of the module that are also called between steps
        (see `gathered_copy`).

        Raises UserError for raw settings that DeepSpeed rejects.
        """
        deepspeed = start_processes()
        if config.threads:
            torch.set_num_threads(config.threads)
        optimizer = torch.optim.AdamW(optimizer_groups(module, stage.optim), betas=stage.optim.betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(stage.optim, stage.steps))
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": stage.batch_size,
            "gradient_clipping": stage.optim.max_grad_norm,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if config.precision == "bf16":
            # Without the list, ZeRO sums the gradients of linear layers over the ranks in bf16.
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            if is_rank_zero() and not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                console.print(
                    "  warning: this CPU has no bf16 arithmetic and emulates it, which is many times slower; "
                    "set engine.precision to fp32"
                )
        settings = merge(settings, config.deepspeed)
        partitioned = (settings["zero_optimization"] or {}).get("stage") == 3
        self._copies = {part: copy.deepcopy(part) for part in modules_called_between_steps} if partitioned else {}
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, lr_scheduler=scheduler, config=settings
            )
        except (ValueError, AssertionError, KeyError) as error:
            raise UserError(f"DeepSpeed rejected engine.deepspeed ({error}); check the raw settings.") from error
        self.module = module

    @property
    def device(self) -> torch.device:
        """Device that batches must be on."""
        return self.deepspeed.device

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 3 partitions the parameters."""
        return self.deepspeed.zero_optimization_stage()

    def gathered(self, *modules: nn.Module) -> contextlib.AbstractContextManager[object]:
        """Context in which every rank has the modules' full parameters; all ranks must enter it."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter for module in modules for parameter in module.parameters()])

    def gathered_copy(self, part: nn.Module) -> nn.Module:
        """A part of the module that can be called between steps.

        ZeRO 3 gathers parameters in the order in which a step calls them, and other calls would
        change this order; for ZeRO 3, it is therefore an up-to-date copy of the part, otherwise the
        part itself. All ranks must call this together.
        """
        if part not in self._copies:
            return part
        plain = self._copies[part].to(self.device)
        with self.gathered(part), torch.no_grad():
            for copied, original in zip(plain.parameters(), part.parameters(), strict=True):
                copied.copy_(original)
        return plain

    def step(self, batch: Any) -> dict[str, float]:
        """One update; returns the module's scalars, including `loss`."""
        self.deepspeed.train()
        outputs: dict[str, Tensor] = self.deepspeed(batch)
        self.deepspeed.backward(outputs["loss"])
        self.deepspeed.step()
        count_update(self.module)
        return {name: float(value.detach()) for name, value in outputs.items()}

    def weights_are_finite(self) -> bool:
        """Whether all trained parameters on this rank are finite (under ZeRO 3, its partitions)."""
        # The sum of a tensor is not finite if one of its elements is not.
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        sums = [getattr(parameter, "ds_tensor", parameter).detach().sum() for parameter in trained]
        return bool(torch.stack(sums).isfinite().all())

    def save(self, folder: Path, state: dict[str, Any], write_extra: Callable[[Path], None]) -> None:
        """Publish the checkpoint `folder` atomically.

        It contains DeepSpeed's state, `state.json` with `state`, the files that
        `write_extra(temporary folder)` adds on each rank, and a manifest with checksums.
        """
        with contextlib.ExitStack() as context:
            temporary = on_rank_zero(lambda: context.enter_context(published(folder)))
            self.deepspeed.save_checkpoint(str(temporary), tag=_DEEPSPEED_TAG)
            on_all_ranks(lambda: write_extra(temporary))
            on_rank_zero(lambda: write_state(temporary, state))
            on_rank_zero(context.close)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load weights, optimizer and schedule from a checkpoint; returns its state.

        Raises UserError if it was written by another number of processes, or has no DeepSpeed
        state.
        """
        state = read_state(folder)
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag=_DEEPSPEED_TAG)
        if path is None:
            raise UserError(f"{folder} contains no DeepSpeed state; remove it to resume from an older checkpoint.")
        return state


def start_processes() -> Any:
    """Import DeepSpeed and initialize its process group, once.

    Returns the package.
    """
    deepspeed = import_deepspeed()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())  # DeepSpeed does so only after tensors are placed
    # DeepSpeed would compile shared-memory collectives for the CPU at the first start, for up to a
    # minute, and a start that is killed meanwhile leaves a lock for which all later ones wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized() and world_size() == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    return deepspeed
