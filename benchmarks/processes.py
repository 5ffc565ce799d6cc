"""Python subprocesses, for benchmarks that include the start of Python."""

import json
import os
import subprocess
import sys
from typing import Any


def python(*command: object, **environment: str) -> dict[str, Any]:
    """Run a Python process and return the JSON object that it prints on its last line.

    Args:
        command: a script and its arguments.
        environment: environment variables to set.
    """
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])
