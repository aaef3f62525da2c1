"""What several commands need: the run they are about."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realm.run.folder import Run

EPILOG = "Any field of the config can be overridden on the command line: --pretrain.steps 1000 --run runs/other."


def open_run(options: argparse.Namespace) -> "Run":
    """The run of `--config` (created where new) or of `--run`."""
    from realm.run.config_file import load_config
    from realm.run.folder import Run
    from realm.runtime.distributed import on_rank_zero, world_size

    if world_size() > 1:  # under a launcher
        from realm.training.engine import start_processes

        start_processes()
    if not hasattr(options, "config"):
        return Run.open(options.run, options.overrides)
    config = load_config(options.config, options.overrides)
    return on_rank_zero(lambda: Run.create(config))
