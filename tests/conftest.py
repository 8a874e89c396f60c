"""What holds for every test.

Children can be interrupted whatever started the tests: a shell that runs them in the background has
SIGINT ignored, and children inherit that.

Triton runs kernels in Python, on CPU tensors: it decides that when a kernel is imported, so here,
before any is. What needs the compiler runs in a process of its own (tests/sass.py).
"""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["TRITON_INTERPRET"] = "1"
