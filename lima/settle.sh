#!/bin/bash
# Sent by setup into the base instance, as root, right before the VM is saved as it runs. Its clones
# go on from here (guest/wake.sh): what they need runs, and nothing else is about to.
set -eu
systemctl is-system-running --wait > /dev/null || true
if systemctl cat docker.service > /dev/null 2>&1; then
  systemctl start docker.service
fi
systemctl stop '*.timer' apt-daily.service apt-daily-upgrade.service
journalctl -q --rotate --vacuum-time=1s > /dev/null 2>&1
umount /mnt/lima-cidata
rm -f /run/lima-ssh-ready /run/lima-boot-done
mkdir -p /run/agent-vm
touch /run/agent-vm/saved
fstrim -a || true
sync
echo 3 > /proc/sys/vm/drop_caches
