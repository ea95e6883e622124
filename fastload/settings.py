"""Settings: one frozen dataclass, passed down; the only reader of the environment.

Argument > environment > platform > default. Units are in the names. ``fastload settings`` prints every value with its
origin and the help that stands beside the field here; ``docs/settings.md`` is tested against it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError

MIB = 1 << 20
_TRUE = {"1", "on", "yes", "true"}
_FALSE = {"0", "off", "no", "false", ""}


def _setting(default: Any, help: str, *env: str, secret: bool = False, low: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "env": env, "secret": secret, "low": low}, repr=not secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a load behaves. Make one with :meth:`resolve`; change one with :func:`dataclasses.replace`."""

    cache_dir: Path = _setting(
        Path("~/.cache/huggingface/hub"),
        "the Hugging Face cache",
        "FASTLOAD_CACHE_DIR",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
    )
    endpoint: str = _setting("https://huggingface.co", "base URL of the hub", "FASTLOAD_ENDPOINT", "HF_ENDPOINT")
    token: str | None = _setting(
        None, "access token; else the token file; empty: none", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", secret=True
    )
    token_path: Path = _setting(Path("~/.cache/huggingface/token"), "file that holds the token", "HF_TOKEN_PATH")
    offline: bool = _setting(
        False, "never use the network", "FASTLOAD_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
    )
    network_cache: bool | None = _setting(
        None,
        "other machines may write to the cache too (NFS, FUSE volumes …); unset: as the filesystem's type says",
        "FASTLOAD_NETWORK_CACHE",
    )
    symlinks: bool = _setting(True, "link snapshots to blobs; off: move the blob there", "FASTLOAD_SYMLINKS")
    mirrors: tuple[str, ...] = _setting(
        (), "further base URLs with the Hub's paths, separated by commas; need not be trusted", "FASTLOAD_MIRRORS"
    )
    # Measured (loopback, and 2.5 Gbit/s at 20 ms): 8 to 16 carry the most at the least CPU; 32 lose bytes in full queues.
    connections: int = _setting(
        16,
        "the most connections of one transfer, all mirrors together; it begins with 8 and takes more while they pay",
        "FASTLOAD_CONNECTIONS",
        low=1,
    )
    # Measured: 1 MiB ranges cost 20 % more CPU than 8 MiB, 4 MiB 2 %; above 8 nothing is gained.
    range_bytes: int = _setting(
        8 * MIB, "size of one ranged GET, in bytes (rounded to 64 KiB)", "FASTLOAD_RANGE_BYTES", low=65536
    )
    # Reasoned: one slot for each connection and as many again that are being written.
    ring_bytes: int = _setting(
        128 * MIB, "memory for bytes in flight: all that a transfer takes", "FASTLOAD_RING_BYTES", low=65536
    )
    shards: int = _setting(
        2, "weight files in flight at once (hashing runs in parallel across files)", "FASTLOAD_SHARDS", low=1
    )
    # Guessed: with jittered waits of 0.2 to 10 s this rides out about a minute of a failing mirror.
    attempts: int = _setting(10, "tries a range gets, over all mirrors", "FASTLOAD_ATTEMPTS", low=1)
    connect_s: float = _setting(
        10.0, "time to open a connection, in seconds", "FASTLOAD_CONNECT_S", "HF_HUB_ETAG_TIMEOUT", low=0.01
    )
    stall_s: float = _setting(
        10.0,
        "time without a byte, or below slow_bytes_per_s, that ends a request, in seconds",
        "FASTLOAD_STALL_S",
        "HF_HUB_DOWNLOAD_TIMEOUT",
        low=0.01,
    )
    # Guessed: a tenth of the slowest home line; a healthy server that is shared by many stays above it.
    slow_bytes_per_s: int = _setting(
        32 * 1024,
        "a connection below this rate for stall_s is dropped and its range goes elsewhere",
        "FASTLOAD_SLOW_BYTES_PER_S",
        low=0,
    )
    retry_after_max_s: float = _setting(
        300.0,
        "the longest wait that a server's Retry-After is granted, in seconds",
        "FASTLOAD_RETRY_AFTER_MAX_S",
        low=0,
    )
    read_ahead: bool = _setting(
        True,
        "read cached weights that are not in memory in large pieces while the program starts",
        "FASTLOAD_READ_AHEAD",
    )
    pause_gc: bool = _setting(
        True, "collect garbage rarely while a program starts, until its first model is loaded", "FASTLOAD_PAUSE_GC"
    )
    process: bool | None = _setting(
        None,
        "run the transfer of load, stream and start in a child process; unset: unless the program has imported what the"
        " load needs and is at rest",
        "FASTLOAD_PROCESS",
    )
    netrc_path: Path = _setting(Path("~/.netrc"), "file that holds passwords, if trust_env", "NETRC")
    trust_env: bool = _setting(True, "honour HTTP(S)_PROXY, ALL_PROXY, NO_PROXY and .netrc", "FASTLOAD_TRUST_ENV")
    ca_file: Path | None = _setting(
        None,
        "PEM file of certificate authorities to trust instead of the system's",
        "FASTLOAD_CA_FILE",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
    )
    plugins: tuple[str, ...] | None = _setting(
        None,
        "names of the plugins to load, separated by commas; unset: all, empty: built-in ones only",
        "FASTLOAD_PLUGINS",
    )
    profile_history: Path | None = _setting(
        None, "local file to which every load adds one line of JSON, its profile", "FASTLOAD_PROFILE_HISTORY"
    )
    event_socket: str | None = _setting(
        None, "Unix datagram socket (path or @name) that gets every event of every load", "FASTLOAD_EVENT_SOCKET"
    )
    # Reasoned: eight slots of 8 MiB, the size of a range; page-locking them takes milliseconds, a whole model's seconds.
    pinned_bytes: int = _setting(
        64 * MIB, "page-locked memory that bytes for a CUDA device pass through", "FASTLOAD_PINNED_BYTES", low=65536
    )
    verify_device: bool = _setting(
        False, "read every byte back from a CUDA device and compare (halves the rate)", "FASTLOAD_VERIFY_DEVICE"
    )
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def resolve(
        cls,
        overrides: Mapping[str, Any] | Settings | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        platform: Mapping[str, Any] | None = None,
        platform_name: str = "",
        **arguments: Any,
    ) -> Settings:
        """Return the settings that hold: arguments over environment over platform over defaults.

        Args:
            overrides: Settings that a caller already resolved (returned with *arguments* applied), or a mapping.
            environ: Read instead of ``os.environ``.
            platform: Defaults of the platform that this process runs on.
            platform_name: Of that platform, for the origin.
            arguments: Further overrides; those that are ``None`` say nothing.

        Raises:
            SettingsError: An unknown name, or a value of the wrong kind; the message names it and its origin.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        if isinstance(overrides, Settings):
            return overrides.with_values(given, "argument") if given else overrides
        if overrides is not None and not isinstance(overrides, Mapping):
            raise SettingsError(f"settings must be a mapping or fastload.Settings, not {type(overrides).__name__}")
        env = os.environ if environ is None else environ
        defaults = _hf_defaults(env)
        settings = cls(**defaults).with_values(platform or {}, f"platform {platform_name}".strip())
        home = next((name for name in ("HF_HOME", "XDG_CACHE_HOME") if env.get(name)), None)
        if home is not None:  # said by the user, or by whoever built the image: above the platform too
            settings = settings.with_values({name: defaults[name] for name in ("cache_dir", "token_path")}, home)
        named = {f.name: next((n for n in f.metadata["env"] if env.get(n)), None) for f in _public_fields()}
        if env.get("FASTLOAD_PLUGINS") == "":  # the one setting whose empty value says something
            named["plugins"] = "FASTLOAD_PLUGINS"
        origins = {name: variable for name, variable in named.items() if variable is not None}
        values: dict[str, Any] = {name: env[variable] for name, variable in origins.items()}
        if "symlinks" not in values and env.get("HF_HUB_DISABLE_SYMLINKS"):
            origins["symlinks"] = "HF_HUB_DISABLE_SYMLINKS"
            values["symlinks"] = not _flag(env["HF_HUB_DISABLE_SYMLINKS"], "HF_HUB_DISABLE_SYMLINKS", "environment")
        # All at once: range_bytes may be above the ring's default where the ring is set too.
        settings = settings._with(values, origins)
        return settings.with_values({**(overrides or {}), **given}, "argument")

    def with_values(self, values: Mapping[str, Any], origin: str) -> Settings:
        """Return a copy with *values*, checked; *origin* is what an error and ``fastload settings`` will name."""
        return self._with(values, dict.fromkeys(values, origin))

    def _with(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
        if not values:
            return self
        known = {f.name: f for f in _public_fields()}
        checked = {}
        for name, value in values.items():
            if name not in known:
                raise SettingsError(f"unknown setting {name!r} ({origins[name]})", hint=_nearest(str(name), known))
            checked[name] = _convert(known[name], value, origins[name])
        result = replace(self, **checked, origins={**self.origins, **origins})
        if result.ring_bytes < result.range_bytes:
            if "range_bytes" in checked:
                raise SettingsError(
                    f"range_bytes={result.range_bytes} ({origins['range_bytes']}) must fit into "
                    f"ring_bytes={result.ring_bytes} ({result.origins.get('ring_bytes', 'default')})"
                )
            result = replace(result, range_bytes=result.ring_bytes)
        return result

    def table(self) -> list[dict[str, Any]]:
        """Return one record a setting: name, value (secrets masked), origin, environment names, help."""
        rows = []
        for f in _public_fields():
            value = getattr(self, f.name)
            if f.metadata["secret"] and value is not None:
                value = "***"
            rows.append(
                {
                    "name": f.name,
                    "value": str(value) if isinstance(value, Path) else value,
                    "origin": self.origins.get(f.name, "default"),
                    "env": list(f.metadata["env"]),
                    "help": f.metadata["help"],
                }
            )
        return rows

    def to_record(self) -> dict[str, Any]:
        """Return plain data for the transfer process; holds the token, so it goes through a pipe, never argv."""
        record = {f.name: getattr(self, f.name) for f in _public_fields()}
        return {n: str(v) if isinstance(v, Path) else v for n, v in record.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """Return what :meth:`to_record` wrote."""
        return cls().with_values({n: v for n, v in record.items() if v is not None}, "parent")


def _public_fields() -> list[Any]:
    return [f for f in fields(Settings) if f.name != "origins"]


def _hf_defaults(env: Mapping[str, str]) -> dict[str, Any]:
    """Where Hugging Face's libraries look, from HF_HOME and XDG_CACHE_HOME (huggingface_hub.constants)."""
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(env.get("HF_HOME") or f"{base}/huggingface").expanduser()
    return {"cache_dir": home / "hub", "token_path": home / "token", "netrc_path": Path("~/.netrc").expanduser()}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "`fastload settings` lists them"


def _flag(value: Any, name: str, origin: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise SettingsError(f"{name}={value!r} ({origin}) is neither true nor false", hint="use 1 or 0")


_SUFFIXES = {"k": 1 << 10, "kib": 1 << 10, "kb": 1000, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
             "g": 1 << 30, "gib": 1 << 30, "gb": 10**9, "b": 1}  # fmt: skip


def _number(value: Any, name: str, origin: str, *, whole: bool) -> int | float:
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and whole:
            text = value.strip().lower().replace("_", "")
            digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
            return int(float(digits) * _SUFFIXES[text[len(digits) :].strip()]) if digits != text else int(text)
        number = int(value) if whole else float(value)
        if whole and number != value:
            raise ValueError
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
        kind = "a whole number" if whole else "a number"
        raise SettingsError(f"{name}={value!r} ({origin}) is not {kind}") from None
    return number


def _url(value: Any, name: str, origin: str) -> str:
    text = str(value).strip().rstrip("/")
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # brackets or a port that are none
        sound = False
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise SettingsError(f"{name} ({origin}) holds credentials", hint="use HF_TOKEN, or a .netrc file")
    if not sound or "?" in text or "#" in text or any(c.isspace() for c in text):
        raise SettingsError(f"{name}={text!r} ({origin}) is not a base URL", hint="for example https://huggingface.co")
    return text


def _listed(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else list(value)
    return tuple(str(i).strip() for i in items if str(i).strip())


def _convert(f: Any, value: Any, origin: str) -> Any:
    """Return *value* as field *f* holds it, or raise an error that names field and origin."""
    kind = str(f.type)
    if value is None:
        if "None" in kind:
            return None
        raise SettingsError(f"{f.name}=None ({origin}) is not a value")
    converters: dict[str, Callable[[], Any]] = {
        "bool": lambda: _flag(value, f.name, origin),
        "bool | None": lambda: _flag(value, f.name, origin),
        "int": lambda: _number(value, f.name, origin, whole=True),
        "float": lambda: _number(value, f.name, origin, whole=False),
        "Path": lambda: Path(os.path.expandvars(str(value))).expanduser(),
        "Path | None": lambda: Path(os.path.expandvars(str(value))).expanduser(),
        "tuple[str, ...]": lambda: tuple(_url(u, f.name, origin) for u in _listed(value)),
        "tuple[str, ...] | None": lambda: _listed(value),
        "str": lambda: _url(value, f.name, origin),
        "str | None": lambda: str(value).strip() or ("" if value == "" else None),
    }
    result = converters[kind]()
    low = f.metadata["low"]
    if low is not None and result < low:
        raise SettingsError(f"{f.name}={value!r} ({origin}) is below {low}")
    return result
