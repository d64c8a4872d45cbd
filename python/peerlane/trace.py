"""When what happens in a program: its own spans, beside those of Peerlane's calls.

    with peerlane.trace.Span("pass", **{"pass": "decode"}):
        ...

Under `peerlane trace -- python program.py`, or after `start`, they are recorded; without, a span costs a fraction of a
microsecond. docs/trace.md says what the arguments `pass`, `sends` and `hears` mean.
"""

from ._peerlane import Span
from ._peerlane import trace_flush as flush
from ._peerlane import trace_is_recording as is_recording
from ._peerlane import trace_start as start

__all__ = ["Span", "flush", "is_recording", "start"]
