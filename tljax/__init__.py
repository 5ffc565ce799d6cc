"""Transfer learning in JAX: a network is a short list of named stages, every tool a pure function.

The public names stand in ``__init__.pyi``. They are imported when they are first used, so that
``--help`` need not wait for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
