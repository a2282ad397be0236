"""Exceptions as a signal handler raises them: at each line in turn."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """An exception that a signal handler raises."""


class SoftTimeLimitExceeded(Exception):
    """An exception as Celery raises it. For SQLAlchemy it is no reason to close a connection."""


def is_in_a_finalizer(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def interrupted_at_each_line(
    work: Callable[[], object], *files: str, each: str = "line", by: type[BaseException] = Interrupted
) -> Iterator[None]:
    """Do the work again and again, each time with an exception at the next line of these files that it reaches.

    each: "opcode" raises it between any two steps of the interpreter
    by: the exception
    """
    number = 0
    before = sys.gettrace()  # coverage's own, if it is measured

    def trace(frame: FrameType, what: str, _: object) -> Any:
        nonlocal left
        if what == "call" and (not frame.f_code.co_filename.endswith(files) or is_in_a_finalizer(frame)):
            return None
        frame.f_trace_opcodes = each == "opcode"
        if what == each:
            left -= 1
            if left == 0:
                raise by
        return trace

    gc.collect()
    gc.freeze()  # skips the objects of before, so that each collection is quick
    while True:
        number += 1
        left = number
        sys.settrace(trace)
        try:
            work()
        except by:
            pass
        finally:
            sys.settrace(before)
        gc.collect()
        yield
        if left > 0:
            gc.unfreeze()
            assert number > 10, "it never came to these files"
            return
