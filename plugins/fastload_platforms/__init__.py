"""Recognises the serving platform that this process runs on, and says where its cache lies.

From environment variables alone: no platform's SDK is imported, nothing is asked over the network. What it says are
defaults; variables (``HF_HOME`` among them) and arguments win over them.
"""

from __future__ import annotations

from collections.abc import Mapping

import fastload
from fastload.types import Platform

from .known import recognise


@fastload.hookimpl
def fastload_platform(environ: Mapping[str, str]) -> Platform | None:
    return recognise(environ)
