"""Entry point of the `realm` command and of `python -m realm`."""

import gc
import signal


def main() -> int:
    """Run the command line; a signal before it is imported ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from realm.app.cli import main as run

    status = run()
    gc.freeze()  # otherwise Python's exit examines every object of the imported libraries: seconds
    return status


if __name__ == "__main__":
    raise SystemExit(main())
