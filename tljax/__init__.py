"""Transfer learning in JAX: a network is a short list of named stages, every tool a pure function.

``__init__.pyi`` lists the public names. Each is imported when it is first used, so that ``--help``
does not wait for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
