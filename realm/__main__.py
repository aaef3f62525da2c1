"""`python -m realm`."""

from realm.cli import main

raise SystemExit(main())
