"""The Hugging Face cache on disk: blobs, snapshots, refs, locks, and the little that this package keeps beside them.

    {root}/CACHEDIR.TAG
    {root}/.locks/models--org--name/{digest}.lock              one writer a blob; huggingface_hub takes the same lock
    {root}/models--org--name/
        blobs/{digest}                                         sha256 or git-sha1: the Hub's ETag
        blobs/{digest}.fastload.incomplete, ….fastload.journal ours: a file on its way (`hf cache prune` may drop it)
        snapshots/{commit}/{path} -> ../../blobs/{digest}
        refs/{revision}   trees/{commit}.json   .no_exist/{commit}/{path}
        .fastload/verified/{digest}                            ours: this blob was hashed here, and found right

huggingface_hub has no public "put this blob into the cache", so what it would make is made here, and a test compares
the two trees entry by entry.
"""

from .check import FileCheck, check_snapshot
from .disk import cache_error, check_path, in_flight_fd, in_flight_link, is_in_flight
from .repo import RepoCache

__all__ = [
    "FileCheck", "RepoCache", "cache_error", "check_path", "check_snapshot", "in_flight_fd", "in_flight_link",
    "is_in_flight",
]  # fmt: skip
