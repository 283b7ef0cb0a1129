"""vLLM's own server without ALTER: `python -m benchmarks.serving.base_server MODEL [any vllm serve flag]`.

The console script of the CPU build does not start: it looks its version up under the GPU build's name.
"""

from __future__ import annotations

import sys

import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server

from server.launch import parse_vllm_args

if __name__ == "__main__":
    uvloop.run(run_server(parse_vllm_args(sys.argv[1], sys.argv[2:])))
