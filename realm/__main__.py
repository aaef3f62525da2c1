"""`python -m realm`."""

from realm.app.cli import main

raise SystemExit(main())
