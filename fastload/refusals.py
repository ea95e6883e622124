"""What a hub's refusal means, and what the user can do about it. Pure functions.

The codes are the Hub's (``X-Error-Code``, ``X-Error-Message``); other hubs mostly send the status alone.
"""

from __future__ import annotations

from .errors import AccessError, MirrorStatusError, NotFoundError, SourceError

_LOGIN = "log in (`hf auth login`) or set HF_TOKEN"


def refusal(
    error: MirrorStatusError, source: str, revision: str, *, token: bool, file: str | None = None
) -> SourceError | None:
    """Return the error that a user understands for a hub's 4xx, or ``None`` where it is not one.

    Args:
        source: ``org/name``.
        token: Whether the request carried a token.
        file: The file that was asked for; ``None`` for the repository itself.
    """
    reason = error.message
    code = error.code or ""
    what = f"{file} of {source}" if file else source
    if code == "RevisionNotFound":
        return NotFoundError(
            f"{source} has no revision {revision!r} ({reason})",
            hint="branches, tags and full commit hashes are revisions",
        )
    if code == "EntryNotFound":
        return NotFoundError(f"{source} at {revision} has no file {file!r} ({reason})")
    if code == "GatedRepo":
        hint = "ask for access on the model's page" + ("" if token else f", then {_LOGIN}")
        return AccessError(f"{what} is gated: {reason}", hint=hint)
    if "disabled" in reason.lower() and error.status == 403:
        return AccessError(
            f"{what} has been disabled by the hub: {reason}", hint="choose another model, or a mirror of your own"
        )
    if code == "RepoNotFound" or (error.status in (401, 404) and file is None):
        return NotFoundError(
            f"{source} does not exist at this hub, or is private ({reason})",
            hint=f"check the name; if it is private, {_LOGIN}"
            if not token
            else "check the name, and that your token may read it",
        )
    if error.status in (401, 403):
        return AccessError(
            f"{what}: the hub refuses access ({reason})", hint=_LOGIN if not token else "your token may not read it"
        )
    if error.status in (404, 410):
        return NotFoundError(f"{what} is not there ({reason})")
    return None
