"""What goes wrong in scripts and callbacks is printed, and the host goes on."""

import traceback
from contextlib import contextmanager


@contextmanager
def reported(what):
    try:
        yield
    except Exception:  # noqa: BLE001 as the host does
        print(f"*** Error: {what}")
        traceback.print_exc()
