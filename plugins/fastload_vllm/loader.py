"""vLLM's default loader with another source of weights; all that it does with them stays its own."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

import fastload
from fastload.settings import Settings


class FastloadModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads weights through fastload: the download starts before the model is built, tensors come as they arrive.

    Every rank of a node iterates over all weights, as with vLLM's own loader; one of them downloads, the others read along.

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
        self._running: Any = None
        # What is left to vLLM's own way knows neither our format nor our settings.
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config={}))

    def download_model(self, model_config: Any) -> None:
        """Fetch what a load will read into the cache, verified."""
        if (running := self._start(model_config)) is not None:
            running.wait()

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        """Build the model while the weights begin to travel."""
        self._running = self._start(model_config)
        return super().create_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill *model*; returns when all that went into it is verified.

        Raises:
            IntegrityError: It is not what the hub lists.
        """
        try:
            super().load_weights(model, model_config)
        finally:
            if self._running is not None:
                self._running.cancel()
                self._running = None

    def _start(self, model_config: Any) -> Any:
        if os.path.isdir(model_config.model) or _uses_modelscope() or self._has_filters():
            return None
        return fastload.start(model_config.model, revision=model_config.revision, settings=self._settings)

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, Any], None, None]:
        if not self._streams(source):
            with fastload.accelerate():
                yield from super()._get_weights_iterator(source)
            return
        folder = f"{source.subfolder}/" if source.subfolder else ""
        patterns = source.allow_patterns_overrides or (["*.safetensors"] if folder else None)
        files = None if patterns is None else [folder + pattern for pattern in patterns]
        unused = source.is_unused_weight or (lambda name: False)
        with fastload.stream(
            source.model_or_path, revision=source.revision, files=files, settings=self._settings
        ) as weights:
            for name, tensor in weights:
                if not unused(name) and not should_skip_weight(name, self.local_expert_ids):
                    yield source.prefix + name, tensor

    def _streams(self, source: Any) -> bool:
        """Tell whether vLLM would read these files one tensor after another, and nothing but that."""
        strategy = self.load_config.safetensors_load_strategy
        special = self._encoder_only_lm_prefixes is not None or strategy == "torchao"
        return not special and not self._has_filters() and not _uses_modelscope()

    def _has_filters(self) -> bool:
        """Tell whether somebody chose files to leave out; by default it is what lies in other folders."""
        return bool(self.load_config.ignore_patterns) and self.load_config.ignore_patterns != ["original/**/*"]


def _uses_modelscope() -> bool:
    return os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
