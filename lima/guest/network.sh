#!/bin/bash
# Sent by a run into its VM, as root, before the agent starts, where the host has closed the network
# (see qemu.py). First it is seen to be closed, from in here; what is open ends the run. Then every
# program is led to the host's egress.py, at ports of 127.0.0.1 that ssh has brought here. That is
# convenience, for what knows no proxy: who undoes it has no network at all.
# usage: network.sh SSH-PORT [PROXY-PORT DNS-PORT]
set -eu -o pipefail

# QEMU tells a closed-in VM no router; with one it is seen who answers.
ip route replace default via 192.168.5.2 dev eth0

# QEMU answers each TCP connection of a closed-in VM with a reset, at once: a silence is no proof.
# The VM's own ssh port listens on the host's loopback: in a VM that is open it is reached there.
python3 -IS - "$1" <<'PYTHON'
import contextlib, errno, select, socket, sys, time

port = int(sys.argv[1])
places = [("192.168.5.2", port), ("10.0.2.2", port), ("192.168.5.3", 53), ("192.168.0.1", 80),
          ("192.168.1.1", 80), ("10.0.0.1", 80), ("172.16.0.1", 80), ("169.254.169.254", 80),
          ("1.1.1.1", 443), ("fec0::2", port), ("2606:4700:4700::1111", 443)]
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
        with contextlib.suppress(BlockingIOError):
            sock.connect((address, at))
        if data:
            sock.send(data)
        silent[sock] = (address, at)
    except OSError as error:  # no route, or refused already
        if kind == stream and error.errno == errno.ECONNREFUSED:
            has_to_refuse.discard(address)
began, seconds = time.monotonic(), 0.0
while seconds < 0.7 or (seconds < 10 and has_to_refuse):
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
PYTHON

[ "$#" = 3 ] || { ip route del default; exit 0; }  # no way out: programs need not wait for it
for tool in redsocks nft; do
  command -v "$tool" > /dev/null || {
    echo "the base instance has no $tool, it is older than this agent-vm: agent-vm setup"
    exit 1
  }
done
mkdir -p /run/agent-vm
cat > /run/agent-vm/redsocks.conf <<CONF
base { daemon = on; log_info = off; log = "file:/run/agent-vm/redsocks.log"; redirector = iptables;
  redsocks_conn_max = 1000; rlimit_nofile = 8192; }
redsocks { local_ip = 127.0.0.1; local_port = 47105; ip = 127.0.0.1; port = $2;
  type = http-connect; }
CONF
redsocks -c /run/agent-vm/redsocks.conf
# DNS over UDP, asked again over TCP. (What redsocks has for it answers "truncated", offering no
# recursion: glibc takes that for no answer, and containers would find no name.)
setsid -f python3 -IS - "$3" > /dev/null 2>&1 <<'PYTHON'
import socket, sys, threading

def answer(query, client):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20) as tcp:
        tcp.sendall(len(query).to_bytes(2, "big") + query)
        failed = query[:2] + b"\x81\x82" + query[4:]
        udp.sendto(tcp.recv(4096)[2:] or failed, client)

udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 47106))
while True:
    threading.Thread(target=answer, args=udp.recvfrom(4096)).start()
PYTHON
resolvectl dns eth0 192.168.5.3 && resolvectl domain eth0 '~.' ||
  echo "nameserver 192.168.5.3" > /etc/resolv.conf  # an address that the rules below lead
# TCP that would leave the VM goes to redsocks, DNS to egress.py. Containers come by the second
# chain.
sysctl -q -w net.ipv4.conf.all.route_localnet=1
nft -f - <<RULES
table ip agent-vm
delete table ip agent-vm
table ip agent-vm {
  chain own {
    type nat hook output priority -110;
    oifname != "eth0" return
    udp dport 53 dnat to 127.0.0.1:47106
    tcp dport 53 dnat to 127.0.0.1:$3
    meta l4proto tcp dnat to 127.0.0.1:47105
  }
  chain containers {
    type nat hook prerouting priority -110;
    iifname { "eth0", "lo" } return
    fib daddr oifname != "eth0" return
    udp dport 53 dnat to 127.0.0.1:47106
    tcp dport 53 dnat to 127.0.0.1:$3
    meta l4proto tcp dnat to 127.0.0.1:47105
  }
}
RULES
# For services, and for programs that do ask a proxy: it says why it refuses.
sed -i '/_proxy=/Id' /etc/environment
for name in http_proxy https_proxy HTTP_PROXY HTTPS_PROXY; do
  echo "$name=http://127.0.0.1:$2"
done >> /etc/environment
echo "no_proxy=localhost,127.0.0.1" >> /etc/environment

said=$(curl -sS -m 10 --noproxy '*' "http://127.0.0.1:$2/" 2>&1) || true
case $said in
  agent-vm:*) ;;  # that this is a proxy
  *) echo "the way out does not answer: ${said:0:300}"; exit 1 ;;
esac
