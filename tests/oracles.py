"""Import timm, torchvision and peft beside the CPU build of torch.

`make test` installs them into a folder of their own, because torchvision cannot be imported in a
plain process: its compiled library, which declares its operators, fits other builds of torch. Its
models need no operator, so declaring their names is enough; the library, which some builds of torch
would load, is refused. transformers is imported before, and goes on without torchvision.
"""

import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers.utils import import_utils


def load(name: str) -> Any:
    """Import a module of timm, torchvision or peft."""
    _prepare()
    with mock.patch.object(torch.ops, "load_library", side_effect=OSError("not for this torch")):
        return import_module(name)


@cache
def _prepare() -> torch.library.Library:
    import_utils.is_torchvision_available()  # remembers its answer
    folder = Path(sys.prefix) / "oracles"
    sys.path.append(str(folder))
    registrations = (folder / "torchvision" / "_meta_registrations.py").read_text("utf-8")
    library = torch.library.Library("torchvision", "DEF")
    for name in {*re.findall(r'register_fake\("torchvision::(\w+)"\)', registrations)}:
        library.define(f"{name}(Tensor a) -> Tensor")
    return library
