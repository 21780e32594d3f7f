"""Put a large file in a second place without a second copy of its bytes.

Order of choice: a reflink (own inode, shared blocks), a hard link to the read-only original, a copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

LINK_FROM_BYTES = 1 << 20
# Readable for everyone whatever the umask: a container runs as another user than the one who built.
_COPY_MODE, _LINK_MODE = 0o644, 0o444
# ioctl_ficlone(2): _IOW(0x94, 9, int)
_FICLONE = 0x40049409
_NO_HARD_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}


def place_tree(source: Path, target: Path) -> None:
    """Reproduce every file below `source` under `target`."""
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(parents=True, exist_ok=True)
        else:
            place_file(path, destination)


def place_file(source: Path, target: Path) -> None:
    """Reproduce one file: linked from 1 MiB on, copied and writable below."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size < LINK_FROM_BYTES:
        shutil.copyfile(source, target)
        target.chmod(_COPY_MODE | (source.stat().st_mode & 0o111))
        return
    if not _reflink(source, target):
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINK:
                raise
            shutil.copyfile(source, target)
    # A hard link shares its mode with the artifact; a clone or a copy gets the same one.
    target.chmod(_LINK_MODE)


def _reflink(source: Path, target: Path) -> bool:
    try:
        with source.open("rb") as original, target.open("xb") as clone:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
    except OSError:
        # The file system cannot share blocks (or is another one): leave nothing behind and let the caller choose.
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
        return False
    return True
