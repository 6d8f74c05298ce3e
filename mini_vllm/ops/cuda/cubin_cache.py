"""Compiled kernels on disk: a private directory that survives anything another process or user does to it.

A cubin is code that runs with the user's rights over the GPU, so only files that the user's own processes
wrote are trusted: the directory must belong to the user and be closed to others, and it is opened once and
addressed by descriptor, so that it cannot be swapped afterwards. Files appear by atomic rename and end in a
hash of their content: a reader sees a whole entry or none. No failure here is an error, only a recompilation.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 20  # what trim() leaves: room for some thousand kernels
_HASH_BYTES = hashlib.sha256().digest_size


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/mini_vllm/kernels`, by default under `~/.cache` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification: unset, empty or relative means the default
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mini_vllm" / "kernels"


class CubinCache:
    """A directory of entries, each the bytes stored under a key. Any thread or process may use it at any time."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_directory()
        self.problem: str | None = None
        """Why the cache is not used, or None while it works. Said once in the log."""

    def get(self, key: str) -> bytes | None:
        """The entry of `key`, or None where there is none that can be trusted."""
        with contextlib.suppress(OSError), self._open_directory() as directory:
            file = os.open(key, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
            with open(file, "rb") as stream:
                if os.fstat(file).st_uid != os.getuid():
                    return None
                content = stream.read()
                entry, digest = content[:-_HASH_BYTES], content[-_HASH_BYTES:]
                if hashlib.sha256(entry).digest() != digest:
                    return None
                with contextlib.suppress(OSError):  # on a read-only disk the entry is as good
                    os.utime(file)  # trim() deletes what was used longest ago
                return entry
        return None

    def put(self, key: str, entry: bytes) -> None:
        """Store `entry`. On a full or read-only disk nothing is stored."""
        temporary = f".{secrets.token_hex(8)}"
        try:
            with self._open_directory(create=True) as directory:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                    with open(os.open(temporary, flags, 0o600, dir_fd=directory), "wb") as stream:
                        stream.write(entry + hashlib.sha256(entry).digest())
                    os.replace(temporary, key, src_dir_fd=directory, dst_dir_fd=directory)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=directory)
                    raise
        except OSError as error:
            self._report(f"cannot write to it ({error.strerror})")

    def trim(self, max_bytes: int = MAX_BYTES) -> None:
        """Delete the entries used longest ago until no more than `max_bytes` are left."""
        with contextlib.suppress(OSError), self._open_directory() as directory:
            entries = []
            for name in os.listdir(directory):
                with contextlib.suppress(OSError):  # another process may be trimming too
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    entries.append((status.st_mtime, status.st_size, name))
            excess = sum(size for _, size, _ in entries) - max_bytes
            for _, size, name in sorted(entries):
                if excess <= 0:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=directory)
                excess -= size

    def info(self) -> tuple[int, int]:
        """How many entries there are, and their bytes."""
        with contextlib.suppress(OSError), self._open_directory() as directory:
            sizes = [os.stat(name, dir_fd=directory).st_size for name in os.listdir(directory)]
            return len(sizes), sum(sizes)
        return 0, 0

    def clear(self) -> None:
        """Delete all entries."""
        self.trim(max_bytes=0)

    @contextlib.contextmanager
    def _open_directory(self, create: bool = False):
        """A descriptor of the directory. Raises OSError where it cannot or must not be used."""
        if create and not self.directory.exists():
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid():
                self._report("it belongs to another user; point XDG_CACHE_HOME at a directory of your own")
                raise PermissionError
            if stat.S_IMODE(status.st_mode) & 0o077:
                self._report(f"it is open to other users; delete it, or run: chmod 700 {self.directory}")
                raise PermissionError
            yield descriptor
        finally:
            os.close(descriptor)

    def _report(self, problem: str) -> None:
        if self.problem is None:
            self.problem = problem
            logger.warning("The kernel cache %s is not used: %s.", self.directory, problem)
