"""These tests run the Triton kernels in Triton's interpreter, on a CPU: a pytest process of their own.

TRITON_INTERPRET is read when triton is imported, so this file sets it before anything imports triton.
"""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before tests/triton/conftest.py: run `pytest tests/triton` by itself")
os.environ["TRITON_INTERPRET"] = "1"
