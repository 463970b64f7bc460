#!/bin/bash
# As root in a VM whose network the host holds: leads every program to the host's egress.py, at
# ports of 127.0.0.1 that ssh brings here. That is convenience, for what knows no proxy: who undoes
# it has no network at all. Sent by setup before the VM is saved, and by a run into one that boots.
# usage: network.sh [off]
set -eu -o pipefail
proxy=47101 names=47102 tcp=47105 udp=47106

if [ "${1-}" = off ]; then  # in one that was resumed
  nft delete table ip agent-vm
  rm /run/agent-vm/led
  exit
fi
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
redsocks { local_ip = 127.0.0.1; local_port = $tcp; ip = 127.0.0.1; port = $proxy;
  type = http-connect; }
CONF
redsocks -c /run/agent-vm/redsocks.conf
# DNS over UDP, asked again over TCP. (What redsocks has for it answers "truncated", offering no
# recursion: glibc takes that for no answer, and containers would find no name.)
setsid -f python3 -IS - $names $udp > /dev/null 2>&1 <<'PYTHON'
import socket, sys, threading

def answer(query, client):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20) as tcp:
        tcp.sendall(len(query).to_bytes(2, "big") + query)
        failed = query[:2] + b"\x81\x82" + query[4:]
        udp.sendto(tcp.recv(4096)[2:] or failed, client)

udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", int(sys.argv[2])))
while True:
    threading.Thread(target=answer, args=udp.recvfrom(4096)).start()
PYTHON
resolvectl dns eth0 192.168.5.3 && resolvectl domain eth0 '~.' ||
  echo "nameserver 192.168.5.3" > /etc/resolv.conf  # an address that the rules below lead
# TCP that would leave the VM goes to redsocks, DNS to egress.py. Containers come by the second
# chain. What has the mark is wake.py's probe. What leaves port 22 answers ssh, which the kernel may
# not have followed from its beginning: it would be taken for a new connection.
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
nft -f - <<RULES
table ip agent-vm
delete table ip agent-vm
table ip agent-vm {
  chain own {
    type nat hook output priority -110;
    meta mark 47 return
    oifname != "eth0" return
    tcp sport 22 return
    udp dport 53 dnat to 127.0.0.1:$udp
    tcp dport 53 dnat to 127.0.0.1:$names
    meta l4proto tcp dnat to 127.0.0.1:$tcp
  }
  chain containers {
    type nat hook prerouting priority -110;
    iifname { "eth0", "lo" } return
    fib daddr oifname != "eth0" return
    udp dport 53 dnat to 127.0.0.1:$udp
    tcp dport 53 dnat to 127.0.0.1:$names
    meta l4proto tcp dnat to 127.0.0.1:$tcp
  }
}
RULES
# Also when DHCP, which a closed-in VM asks in vain for a router, has taken away its own.
ip route replace default via 192.168.5.2 dev eth0
touch /run/agent-vm/led
