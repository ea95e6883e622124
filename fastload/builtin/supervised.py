"""Tells every event of every load to the supervisor of this process, where the setting ``event_socket`` names its socket.

One datagram of JSON a message: they keep their order, cannot be cut in half, and nothing stays open between two of them.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..events import Event, log
from ..hookspecs import hookimpl

if TYPE_CHECKING:
    from ..events import Observer
    from ..settings import Settings

#: Guessed: a supervisor that reads nothing for so long hangs, and a load does not wait for it.
_PATIENCE_S = 2.0
#: Guessed: about 8 GB in ranges of 8 MiB.
_MOST_WAITING = 4096
#: Reasoned: below the 208 KiB that the kernel takes by default, whatever an exception's message holds.
_MESSAGE_BYTES = 64 * 1024
#: Reasoned: a page shows no more of one, and four of them in one message stay below the limit.
_TEXT_CHARACTERS = 4000


def tell(address: str, message: Mapping[str, Any], *, patience_s: float | None = None) -> None:
    """Send one message.

    Args:
        address: Path of a Unix datagram socket, or ``@name`` of one in the kernel's abstract namespace (unix(7)).
        patience_s: How long to wait where its queue is full; 0: not at all; ``None``: as long as it takes.

    Raises:
        BlockingIOError: Its queue is full, and that was not to be waited for.
        OSError: Nobody listens there (any more), or nobody reads.
    """
    data = json.dumps(message, default=str).encode()
    if len(data) > _MESSAGE_BYTES:
        data = json.dumps(_shortened(message), default=str).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(patience_s)
        sock.sendto(data, f"\0{address[1:]}" if address.startswith("@") else address)


def _shortened(value: Any) -> Any:
    """Return *value* with long texts, as some exceptions carry them, cut off."""
    if isinstance(value, Mapping):
        return {name: _shortened(inner) for name, inner in value.items()}
    return f"{value[:_TEXT_CHARACTERS]} …" if isinstance(value, str) and len(value) > _TEXT_CHARACTERS else value


@hookimpl
def fastload_observer(source: str, settings: Settings) -> Observer | None:
    """Return what tells the events of a load of *source*."""
    address = settings.event_socket
    if address is None:
        return None
    waiting: deque[dict[str, Any]] = deque()
    silent = False

    def observe(event: Event) -> None:
        nonlocal silent
        if silent:
            return
        waiting.append({"kind": "event", "source": source, "event": event.to_record()})
        try:
            # A loop must not be held: what finds the queue full there is sent with the next event.
            while waiting:
                tell(address, waiting[0], patience_s=0.0 if _in_loop() else _PATIENCE_S)
                waiting.popleft()
        except BlockingIOError:
            silent = len(waiting) > _MOST_WAITING
        except OSError as e:  # the supervisor is gone or hangs: the load is not its business
            silent = True
            log.debug("%s hears no more of the load of %s: %s", address, source, e)

    return observe


def _in_loop() -> bool:
    """Tell whether an event loop runs in this thread."""
    asyncio = sys.modules.get("asyncio")  # whoever runs one has imported it
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
