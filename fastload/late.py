"""Modules that annotations name, imported when somebody evaluates those annotations, and not before.

Tools do so (``typing.get_type_hints``, pydantic's ``validate_call`` …). A program that loads a model does not, and must not
wait for imports that only they need.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Late:
    """Stands for a module at run time, in annotations alone; type checkers are shown the module itself::

        if TYPE_CHECKING:
            import torch
        else:
            torch = Late("torch")

    Args:
        name: Of the module, absolute. Where it is not installed, whoever evaluates the annotation gets an ImportError.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # no type: somebody asks whether this is wrapped, can be copied, …
            raise AttributeError(name)
        return getattr(import_module(self._name), name)
