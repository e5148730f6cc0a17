"""What goes wrong in scripts and callbacks is printed, and the host goes on.

Its last errors are kept for its page of facts.
"""

import sys
import textwrap
import traceback
from contextlib import contextmanager

exception_records = []
KEPT = 5


def get_exceptions():
    return list(reversed(exception_records))


def record_exception():
    _, error, trace = sys.exc_info()
    if error is not None:
        frames = [
            [f"{frame.filename}, line {frame.lineno}, {frame.name}", frame.line]
            for frame in traceback.extract_tb(trace)
        ]
        exception_records.append({"exception": str(error), "traceback": frames})
        del exception_records[:-KEPT]


def report(message, *, exc_info=False):
    record_exception()
    for line in message.splitlines():
        print("***", line, file=sys.stderr)
    if exc_info:
        print(textwrap.indent(traceback.format_exc(), "    "), file=sys.stderr)


def display(error, task):
    record_exception()
    print(f"{task}: {type(error).__name__}", file=sys.stderr)
    traceback.print_exception(type(error), error, error.__traceback__)


@contextmanager
def reported(what):
    try:
        yield
    except Exception:  # noqa: BLE001 as the host does
        report(f"Error running {what}", exc_info=True)
