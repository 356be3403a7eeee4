"""A file whose reader the kernel never lets go: what a hung GPU's sysfs or a dead server's file is.

A FUSE file system of one file that takes each request and answers none; a reader of it cannot even be killed.
Layouts of the messages: include/uapi/linux/fuse.h of Linux.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEADER = struct.Struct("<IIQQIIII")  # fuse_in_header: length, opcode, unique, node, uid, gid, pid, padding
ANSWER = struct.Struct("<IiQ")  # fuse_out_header: length, error, unique
INIT = 26
INIT_ANSWER = struct.Struct("<IIIIHHIIHH").pack(7, 31, 0, 0, 0, 0, 4096, 1, 0, 0) + bytes(28)
DETACH = 2  # MNT_DETACH


def impossible() -> str:
    """Why there can be no such file here, or nothing."""
    return "" if os.getuid() == 0 and os.path.exists("/dev/fuse") else "root and /dev/fuse are needed"


@contextmanager
def stuck(file: Path) -> Iterator[None]:
    """The file, which exists, stuck while this lasts; whoever hangs in it is let go at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    options = f"fd={device},rootmode=100444,user_id=0,group_id=0".encode()
    if libc.mount(b"stuck", bytes(file), b"fuse", 0, options):
        os.close(device)
        raise OSError(ctypes.get_errno(), "mount")
    over = threading.Event()
    server = threading.Thread(target=_take, args=(device, over))
    server.start()
    try:
        yield
    finally:
        over.set()
        server.join()
        os.close(device)  # ends the connection, and with it every read that waits
        libc.umount2(bytes(file), DETACH)


def _take(device: int, over: threading.Event) -> None:
    while not over.is_set():
        if not select.select([device], [], [], 0.05)[0]:
            continue
        request = os.read(device, 1 << 17)
        _, kind, unique, *_ = HEADER.unpack_from(request)
        if kind == INIT:
            os.write(device, ANSWER.pack(ANSWER.size + len(INIT_ANSWER), 0, unique) + INIT_ANSWER)
