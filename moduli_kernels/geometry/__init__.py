"""Manifolds, inhibitors, and the points of neurons on a manifold.

The package's public names come from `__all__` of the files here, so that a new class is named in its own file only.
`MANIFOLDS` and `INHIBITORS` list the classes that the compiled kernels know, in the order of their codes.
"""
# ruff: noqa: F403
from . import base, embedding, flat, inhibitors, klein, ordering, presets, product, sphere
from .base import *
from .base import INHIBITORS as INHIBITORS, MANIFOLDS as MANIFOLDS
from .embedding import *
from .flat import *
from .inhibitors import *
from .klein import *
from .ordering import *
from .presets import *
from .product import *
from .sphere import *

__all__: list[str] = []
__all__ += base.__all__
__all__ += embedding.__all__
__all__ += flat.__all__
__all__ += inhibitors.__all__
__all__ += klein.__all__
__all__ += ordering.__all__
__all__ += presets.__all__
__all__ += product.__all__
__all__ += sphere.__all__
