"""SGLang: ``--load-format fastload`` streams the weights, verified, while the model is being built.

SGLang calls :func:`register` in every process before it reads its arguments (entry-point group ``sglang.srt.plugins``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register() -> None:
    """Make ``fastload`` a load format. Cheap, and harmless when repeated."""
    from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES, add_load_format_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if "fastload" in LOAD_FORMAT_CHOICES:
        return
    add_load_format_choices(["fastload"])
    HookRegistry.register(
        "sglang.srt.configs.load_config.LoadConfig._verify_load_format", _verify_load_format, HookType.AROUND
    )


def _verify_load_format(original: Callable[[Any], None], config: Any) -> None:
    """Put our class in the place of the name, which SGLang's closed list of formats does not have.

    A class is what ``get_model_loader`` takes as a loader of the user's own.
    """
    if isinstance(config.load_format, str) and config.load_format.lower() == "fastload":
        from .loader import FastloadModelLoader

        config.load_format = FastloadModelLoader
    original(config)
