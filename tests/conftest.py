"""Test processes share the cores: each, and every one it starts, computes with one thread.

Set before torch is imported; threads of several processes that wait for each other on the same
cores cost far more than they bring.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
