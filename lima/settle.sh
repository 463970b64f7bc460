#!/bin/bash
# Sent by setup into the base instance, as root, right before it is saved as it runs. Its clones
# go on from here: guest/wake.py waits already, guest/network.sh has led their programs to the way
# out, what they need runs, and nothing else is about to begin.
set -eu
compgen -G '/sys/bus/*/drivers/vmgenid/*:*' > /dev/null || {
  echo "its kernel would make the same random numbers in each clone: it has no vmgenid"
  exit 1
}
systemctl is-system-running --wait > /dev/null || true
if systemctl cat docker.service > /dev/null 2>&1; then
  systemctl start docker.service
fi
# When a state of days ago goes on, all would be due at once.
systemctl stop '*.timer' apt-daily.service apt-daily-upgrade.service
journalctl -q --rotate --vacuum-time=1s > /dev/null 2>&1
# What has a generator of random numbers in its memory draws the same in each clone, as OpenSSL's
# does: a clone starts it anew. These services ask the kernel, whose numbers are others.
systemctl list-units -t service --state=running --plain --no-legend | cut -d ' ' -f 1 |
  grep -vE '^(systemd-|dbus|ssh|docker\.|containerd\.|getty@|serial-|user@|lima-|cron\.|polkit)' \
    > /run/agent-vm/restart || true
[ -z "$(docker ps -q 2> /dev/null)" ] || echo docker.service >> /run/agent-vm/restart
modprobe -a 9p 9pnet_virtio
rm -rf /etc/update-motd.d  # sshd would start what is there at each log-in
umount /mnt/lima-cidata
rm -f /run/lima-ssh-ready /run/lima-boot-done
touch /run/agent-vm/saved
fstrim -a || true
sync
# What each run starts is in memory from the beginning.
{
  for program in curl claude; do "$program" --version; done
  for program in /usr/lib/openssh/sshd-*; do "$program" -?; done
  sudo -u "$SUDO_USER" bash -lc true
} < /dev/null > /dev/null 2>&1 || true
