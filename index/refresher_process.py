"""Start a refresher in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

from index.stopping import GRACE_S, parent_pipe

# Variables that launchers set for their workers; a refresher that inherited them would join the
# trainer's process group.
_LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "NODE_RANK"}
_LAUNCHER_PREFIXES = ("MASTER_", "LOCAL_", "GROUP_", "ROLE_", "CROSS_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_")


def start_refresher(run: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start `realm refresh --run RUN` as a new process, without the launcher's environment
    variables; its output goes to `log_path`. It stops when this process ends."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    log_path.parent.mkdir(parents=True, exist_ok=True)
    pipe = parent_pipe(environment)
    try:
        with log_path.open("ab") as log:
            command = [sys.executable, "-m", "realm", "refresh", "--run", str(run)]
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(pipe,),
            )
    finally:
        os.close(pipe)


def stop_refresher(process: subprocess.Popen[bytes], timeout_s: float = 3 * GRACE_S) -> None:
    """Stop a refresher with SIGTERM, or with SIGKILL if it is still running after `timeout_s`."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:  # such as a suspended process; its lease expires
        process.kill()
        process.wait()
