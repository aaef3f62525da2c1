"""Entry point of `python -m realm`."""

from realm.app.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
