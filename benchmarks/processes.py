"""Processes of their own, for what is timed from the start of Python."""

import json
import os
import subprocess
import sys
from typing import Any


def python(*command: object, **environment: str) -> dict[str, Any]:
    """The JSON object that a Python process prints on its last line.

    Args:
        command: a script and its arguments.
        environment: variables to change.
    """
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])
