"""SGLang's default loader with another source of weights; all that it does with them stays its own."""

from __future__ import annotations

import os
from collections.abc import Generator
from copy import copy
from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_loader.loader import DefaultModelLoader

import fastload
from fastload.settings import Settings


class FastloadModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads weights through fastload: the download starts before the model is built, tensors come as they arrive.

    Every rank of a node iterates over all weights, as with SGLang's own loader; one of them downloads, the others read
    along.

    Args:
        load_config: ``model_loader_extra_config`` takes fastload's settings by name (``{"connections": 16}``);
            ``download_dir`` is the cache.

    Raises:
        SettingsError: It holds something else.
    """

    def __init__(self, load_config: Any) -> None:
        given = dict(load_config.model_loader_extra_config or {})
        if load_config.download_dir is not None:
            given.setdefault("cache_dir", load_config.download_dir)
        Settings.resolve(given)  # now, not when the weights are due
        self._settings = given
        # What is left to SGLang's own way knows neither our format nor our settings.
        plain = copy(load_config)
        plain.load_format, plain.model_loader_extra_config = LoadFormat.AUTO, {}
        super().__init__(plain)

    def download_model(self, model_config: Any) -> None:
        """Fetch what a load will read into the cache, verified."""
        if (running := self._start(model_config)) is not None:
            running.wait()

    def load_model(self, *, model_config: Any, device_config: Any) -> Any:
        """Build the model while the weights travel, and fill it; returns when all that went into it is verified.

        Raises:
            IntegrityError: It is not what the hub lists.
        """
        running = self._start(model_config)
        try:
            return super().load_model(model_config=model_config, device_config=device_config)
        finally:
            if running is not None:
                running.cancel()

    def _start(self, model_config: Any) -> Any:
        if os.path.isdir(model_config.model_path) or _uses_modelscope() or self._has_filters():
            return None
        return fastload.start(model_config.model_path, revision=model_config.revision, settings=self._settings)

    def _get_weights_iterator(self, source: Any, **how: Any) -> Generator[tuple[str, Any], None, None]:
        if not self._streams(source, how):
            with fastload.accelerate():
                yield from super()._get_weights_iterator(source, **how)
            return
        with fastload.stream(
            source.model_or_path,
            revision=source.revision,
            files=source.allow_patterns_overrides,
            settings=self._settings,
        ) as weights:
            draft = self.load_config.draft_model_idx
            if draft is not None:
                yield from self._filter_mtp_weights(iter(weights), source.prefix, draft)
                return
            for name, tensor in weights:
                yield source.prefix + name, tensor

    def _streams(self, source: Any, how: dict[str, Any]) -> bool:
        """Tell whether SGLang would read the model's own files one tensor after another, and nothing but that."""
        config = getattr(source.model_config, "hf_config", None)
        extra_files = bool(getattr(config, "num_nextn_predict_layers", 0))  # drafts in a file of their own
        resolved = how.get("resolved_source") is not None
        return not extra_files and not resolved and not self._has_filters() and not _uses_modelscope()

    def _has_filters(self) -> bool:
        """Tell whether somebody chose files to leave out; by default it is what lies in other folders."""
        return bool(self.load_config.ignore_patterns) and self.load_config.ignore_patterns != ["original/**/*"]


def _uses_modelscope() -> bool:
    return os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true")
