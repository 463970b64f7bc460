#!/bin/bash
# Sent by setup into the base instance, as its user, when all is installed. Prints the hosts of the
# package registries that its own programs are set to: `--network allow` lets these through, and no
# registry is named anywhere in agent-vm. Then forgets what setup's boots have written down of the
# host's proxies, whose passwords are not for a VM that cannot reach them.
{
  grep -hv '^ *#' /etc/apt/sources.list /etc/apt/sources.list.d/* /etc/apt/mirrors/*
  npm config get registry
  python3 -m pip config list
  python3 -c 'from pip._internal.models.index import PyPI as index
print(index.simple_url, f"https://{index.file_storage_domain}/")'  # unless pip is told otherwise
  grep -hv '^ *#' ~/.cargo/config.toml /etc/uv/uv.toml ~/.config/uv/uv.toml
  go env GOPROXY
  go env GOSUMDB | sed 's#^#https://#'
} 2> /dev/null | grep -oE 'https?://([^/@" ]*@)?[A-Za-z0-9.-]+(:[0-9]+)?' | sed -E 's#.*(//|@)##' |
  sort -u | tr '\n' ' '
sudo sed -i '/_proxy=/Id' /etc/environment
sudo rm -f /var/log/cloud-init*.log
sudo journalctl -q --rotate --vacuum-time=1s > /dev/null 2>&1 || true
