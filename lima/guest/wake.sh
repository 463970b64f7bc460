#!/bin/bash
# Sent by a run into its VM, as root, first of all. Of a VM that has booted it waits for Lima's boot
# scripts. A VM that was resumed, from the state that settle.sh left, becomes a machine of its own.
set -eu
cidata=/mnt/lima-cidata
value() { sed -n "s/^$1: *//p" $cidata/meta-data 2> /dev/null | tr -d '"'; }

if ! [ -e /run/agent-vm/saved ]; then
  until id=$(value instance-id); [ -n "$id" ] && grep -qsxF -e "$id" /run/lima-boot-done; do
    sleep 0.1
  done
  exit
fi
# By vmgenid the kernel has made its random numbers anew; what it is given here is for one without.
cat random > /dev/urandom
mount -o ro -L cidata $cidata
name=$(value local-hostname) id=$(value instance-id)
sed -i "s/\<$(hostname)\>/$name/g" /etc/hosts
hostname "$name"
echo "$name" > /etc/hostname
rm -f /etc/machine-id
systemd-machine-id-setup > /dev/null 2>&1
cat /proc/sys/kernel/random/uuid > /run/agent-vm/boot-id
mount --bind /run/agent-vm/boot-id /proc/sys/kernel/random/boot_id
rm /run/agent-vm/saved
systemctl --no-block restart systemd-journald  # its files are the machine's
for file in /run/lima-ssh-ready /run/lima-boot-done; do  # what limactl start waits for
  echo "$id" > $file
done
