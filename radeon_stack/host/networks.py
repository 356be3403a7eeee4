"""Network interfaces and RDMA devices, from sysfs; their addresses from the kernel itself."""

from __future__ import annotations

import fcntl
import socket
import struct

from radeon_stack.host.node_record import MANY, Interface, Rdma
from radeon_stack.host.sysroot import Sysroot

NET, INFINIBAND = "/sys/class/net", "/sys/class/infiniband"
SIOCGIFADDR = 0x8915  # netdevice(7); include/uapi/linux/sockios.h
IFF_UP, IFF_LOOPBACK = 0x1, 0x8  # include/uapi/linux/if.h
IFNAMSIZ = 16
NO_SPEED = (1 << 32) - 1  # SPEED_UNKNOWN of include/uapi/linux/ethtool.h, as an unsigned number


def interfaces(sysroot: Sysroot) -> tuple[Interface, ...]:
    """Each interface with the first IPv4 address it has."""
    return tuple(_interface(sysroot, name) for name in sysroot.names(NET)[:MANY])


def rdma(sysroot: Sysroot) -> tuple[Rdma, ...]:
    """Each port of each device: a RoCE card's link is Ethernet."""
    found = []
    for name in sysroot.names(INFINIBAND):
        for port in sysroot.names(f"{INFINIBAND}/{name}/ports"):
            told = {
                key: sysroot.text(f"{INFINIBAND}/{name}/ports/{port}/{file}") or ""
                for key, file in (("link", "link_layer"), ("state", "state"), ("rate", "rate"))
            }
            # `4: ACTIVE`: the number is the kernel's own.
            found.append(Rdma(name=name, port=port, **told | {"state": told["state"].rpartition(": ")[2]}))
    return tuple(found[:MANY])


def _interface(sysroot: Sysroot, name: str) -> Interface:
    flags = _hex(sysroot.text(f"{NET}/{name}/flags") or "")
    speed = sysroot.number(f"{NET}/{name}/speed")  # -1, or an error, of one that has none
    address = _address(name) if sysroot.live else ""
    return Interface(
        name=name,
        addresses=(address,) if address else (),
        up=bool(flags & IFF_UP) and sysroot.text(f"{NET}/{name}/operstate") in ("up", "unknown"),
        speed=None if speed in (None, 0, NO_SPEED) else speed,
        loopback=bool(flags & IFF_LOOPBACK),
        physical=sysroot.exists(f"{NET}/{name}/device"),
    )


def _address(name: str) -> str:
    request = struct.pack("256s", name.encode()[: IFNAMSIZ - 1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            return socket.inet_ntoa(fcntl.ioctl(one, SIOCGIFADDR, request)[20:24])
        except OSError:  # it has none
            return ""


def _hex(text: str) -> int:
    try:
        return int(text[:20], 16)
    except ValueError:
        return 0
