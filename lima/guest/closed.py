"""As root in a VM: sets its clock, and sees that its network is closed.

QEMU answers each TCP connection of a closed-in VM with a reset, at once: a silence is no proof.
The VM's own ssh port, which is given, listens on the host's loopback: in a VM that is open it is
reached there. What network.sh leads elsewhere by rules goes past them by its mark.
"""

import _socket as socket  # the one around it takes longer to be imported than all of this takes
import errno
import select
import sys
import time

MARK = 47  # see network.sh
port, mode = int(sys.argv[1]), sys.argv[2]
late = ""
while not late.endswith("\n"):  # ssh, which brings it, is not waited for
    with open("clock") as file:
        late = file.read()
time.clock_settime(time.CLOCK_REALTIME, time.time() + int(late) / 1e6)
if mode == "open":
    sys.exit()
places = [
    ("192.168.5.2", port),
    ("10.0.2.2", port),
    ("192.168.5.3", 53),
    ("192.168.0.1", 80),
    ("192.168.1.1", 80),
    ("10.0.0.1", 80),
    ("172.16.0.1", 80),
    ("169.254.169.254", 80),
    ("1.1.1.1", 443),
    ("fec0::2", port),
    ("2606:4700:4700::1111", 443),
]
query = b"\0\1\1\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"  # DNS: A of example.com
stream, datagram, raw = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
tries = [(stream, 0, *place, b"") for place in places]
for address in ("192.168.5.2", "192.168.5.3", "10.0.2.2", "fec0::2", "1.1.1.1", "8.8.8.8"):
    tries += [(datagram, 0, address, 53, query), (datagram, 0, address, 123, b"\x1b" + bytes(47))]
tries += [(raw, 1, "1.1.1.1", 0, b"\x08\0\xf7\xfd\0\1\0\1")]  # an echo request of ICMP
silent, wrong = {}, []
has_to_refuse = {"192.168.5.2", "1.1.1.1"}  # whatever the guest's own routes are
for kind, protocol, address, at, data in tries:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        fault = sock.connect_ex((address, at))
        if fault not in (0, errno.EINPROGRESS):
            raise OSError(fault, "")
        if data:
            sock.send(data)
        silent[sock] = (address, at)
    except OSError as error:  # no route, or refused already
        if kind == stream and error.errno == errno.ECONNREFUSED:
            has_to_refuse.discard(address)
began, seconds = time.monotonic(), 0.0
while seconds < 0.3 or (seconds < 10 and has_to_refuse):
    streams = [sock for sock in silent if sock.type == stream]
    heard, connected, _ = select.select(silent, streams, [], 0.05)
    for sock in {*heard, *connected}:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        address, at = silent.pop(sock)
        if sock.type == stream and error == errno.ECONNREFUSED:
            has_to_refuse.discard(address)
        elif not error:
            wrong.append(f"{address} port {at} answers")
    seconds = time.monotonic() - began
wrong += [f"{address} does not refuse" for address in has_to_refuse]
sys.exit(f"the network is not closed: {', '.join(wrong)}" if wrong else 0)
