"""Old places of names that moved: they work for one release, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(old: str, new: str, **renamed: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names moved.

    Args:
        old: The module, `__name__`.
        new: Where its names are now.
        renamed: Old name to new name, of those that are called otherwise now.
    """

    def get(name: str) -> Any:
        target = renamed.get(name, name)
        home = import_module(new)
        if name.startswith("__") or not hasattr(home, target):  # `__path__` would make a package of the module
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} is now {new}.{target}; the old place goes away in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(home, target)

    return get
