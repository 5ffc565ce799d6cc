"""Several processes on this machine that compute together, as on several hosts."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start_together(
    command: Sequence[str], processes: int, devices: int = 1, **environment: str
) -> list[subprocess.Popen[str]]:
    """Start a command in some processes, which `tljax.runtime.parallel.join` makes one program.

    Args:
        command: the program and its arguments.
        processes: number of processes.
        devices: number of simulated devices of each.
        environment: further environment variables.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        **environment,
    }
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "JAX_PROCESS_ID": str(number)},
        )
        for number in range(processes)
    ]
