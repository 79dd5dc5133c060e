"""Run commands in a network that ends at this machine, and note what tried to leave it.

`unshare --net python alone.py REPORT WORLD COMMAND...`, with only the loopback interface (WORLD is
"loopback"), or also with an interface to nowhere as the default route ("nowhere"): whatever would
go to a network comes out of it, is noted in REPORT, and gets no answer. Needs nothing but Python,
for there may be no `ip` in the place.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

# linux/sockios.h, linux/if_tun.h, linux/if.h
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
IFF_UP, IFF_RUNNING, RTF_UP, RTF_GATEWAY = 1, 64, 1, 2
#: Addresses for documentation (RFC 5737): nobody's.
OWN, GATEWAY = "192.0.2.2", "192.0.2.1"


def _address(ip: str) -> bytes:
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(ip))


def raise_interface(name: bytes) -> None:
    """Bring an interface up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", name, IFF_UP | IFF_RUNNING))


def open_nowhere() -> int:
    """Make the default route end in a descriptor, from which its packets can be read."""
    name = b"nowhere"
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name, IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, ip in ((SIOCSIFADDR, OWN), (SIOCSIFNETMASK, "255.255.255.0")):
            fcntl.ioctl(control, request, struct.pack("16s16s", name, _address(ip)))
        raise_interface(name)
        route = _address("0.0.0.0") + _address(GATEWAY) + _address("0.0.0.0")
        flags = struct.pack("H", RTF_UP | RTF_GATEWAY)
        fcntl.ioctl(control, SIOCADDRT, (bytes(8) + route + flags).ljust(120, b"\0"))
    return tun


def note_packets(tun: int, sent: Counter[str]) -> None:
    """Count packets by destination, for ever."""
    while packet := os.read(tun, 65536):
        if packet[0] >> 4 == 4:
            sent[socket.inet_ntoa(packet[16:20])] += 1
        elif packet[6] in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):  # the kernel looks for routers
            sent[socket.inet_ntop(socket.AF_INET6, packet[24:40])] += 1


def main(report: Path, world: str, command: list[str]) -> int:
    sent: Counter[str] = Counter()
    raise_interface(b"lo")
    if world == "nowhere":
        threading.Thread(target=note_packets, args=(open_nowhere(), sent), daemon=True).start()
    status = subprocess.run(command, check=False).returncode
    report.write_text(json.dumps(sent))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
