"""What ``fastload doctor`` measures of a device, and that it gives everything back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastload.doctor import rates


def test_pinning_and_copying_are_measured_and_given_back(cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HASH_BYTES", "MEMORY_BYTES", "FILE_BYTES", "WIRE_BYTES", "DEVICE_BYTES"):
        monkeypatch.setattr(rates, name, 16 << 20)
    monkeypatch.setattr(rates, "DEVICE_NODES", (tmp_path,))
    device = rates.measure(tmp_path).device
    assert device is not None and device.name
    assert device.pin.bytes_per_s > 0 and device.copy_bytes_per_s > 0
    cuda.empty_cache()
    assert cuda.memory_reserved() == 0
