"""The process that tests the GPUs when ranks of a Python program meet: python -m peerlane.selftest.

It is started by the library, reads a request on its standard input and reports on its standard output.
"""

import sys

from ._peerlane import _serve_self_test

if __name__ == "__main__":
    sys.exit(0 if _serve_self_test() else 1)
