#!/bin/bash
# Sent by a run into its VM, as root: makes the VM this run's own, and sees that it is confined. One
# that has booted has to end Lima's boot scripts first; one that was resumed, from the state that
# settle.sh left, becomes another machine than its base instance and its other clones. No program is
# started for what bash does itself: each costs a while in a VM that has just begun.
# usage, in ~/.agent-vm: wake.sh SSH-PORT led|off|open
set -eu
umask 022
value() { while IFS=': ' read -r key said; do [ "$key" != "$1" ] || echo "${said//\"/}"; done < \
  /mnt/lima-cidata/meta-data; }

resumed=y
if ! [ -e /run/agent-vm/saved ]; then
  resumed=
  until id=$(value instance-id 2> /dev/null) && [ -n "$id" ] &&
    grep -qsxF -e "$id" /run/lima-boot-done; do sleep 0.1; done
fi
# QEMU tells a closed-in VM no router; with one it is seen who answers.
[ "$2" = open ] || ip route replace default via 192.168.5.2 dev eth0
python3 -IS closed.py "$1" "$2" 2>&1 & closed=$!
as_user() {
  setpriv --reuid="$SUDO_UID" --regid="$SUDO_GID" --init-groups env HOME="${PWD%/*}" "$@"
}
as_user bash prepare.sh & prepared=$!

if [ -n "$resumed" ]; then
  # The kernel's random numbers are others by now: settle.sh has seen that it has vmgenid.
  mount -o ro /dev/disk/by-label/cidata /mnt/lima-cidata
  name=$(value local-hostname) id=$(value instance-id) hosts=$(< /etc/hosts)
  echo "${hosts//$HOSTNAME/$name}" > /etc/hosts
  echo "$name" > /etc/hostname
  echo "$name" > /proc/sys/kernel/hostname
  new=$(< /proc/sys/kernel/random/uuid)
  echo "${new//-/}" > /etc/machine-id
  echo "$(< /proc/sys/kernel/random/uuid)" > /run/agent-vm/boot-id
  mount --bind /run/agent-vm/boot-id /proc/sys/kernel/random/boot_id
  [ ! -s /run/agent-vm/restart ] || xargs systemctl restart < /run/agent-vm/restart
  rm /run/agent-vm/saved
  {  # later: what limactl start waits for, as it looks around then; and a journal of the machine's
    sleep 1
    for file in lima-ssh-ready lima-boot-done; do echo "$id" > /run/$file; done
    systemctl restart systemd-journald
  } > /dev/null 2>&1 &
fi
bash mounts.sh
zone=/usr/share/zoneinfo/$(< zone)
[ ! -f "$zone" ] || [ "$zone" -ef /etc/localtime ] || ln -sf "$zone" /etc/localtime

case $2:$([ ! -e /run/agent-vm/led ] || echo led) in
  led:) bash network.sh || exit 9 ;;
  off:led | open:led) bash network.sh off ;;
esac
wait "$prepared"
# The transcripts of a run that may not write them.
[ ! -d copied ] || as_user cp -Rn copied/. ../.claude/projects || true
wait "$closed" || exit 9
case $2 in
  open) exit ;;
  off) ip route del default; exit ;;  # programs need not wait for it
esac
# For services, and for programs that do ask a proxy: it says why it refuses.
for name in http_proxy https_proxy HTTP_PROXY HTTPS_PROXY; do
  echo "$name=http://127.0.0.1:47101"
done >> /etc/environment
echo "no_proxy=localhost,127.0.0.1" >> /etc/environment
said=
# shellcheck disable=SC2015
{ exec 3<> /dev/tcp/127.0.0.1/47101; } 2> /dev/null && printf 'GET / HTTP/1.0\r\n\r\n' >&3 &&
  IFS= read -r -d '' -t 10 -u 3 said || true
case $said in
  *agent-vm:*) ;;  # that this is a proxy
  *) echo "the way out does not answer: ${said:0:300}"; exit 9 ;;
esac
