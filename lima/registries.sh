#!/bin/bash
# Sent by setup into the base instance, as its user, when all is installed: prints the hosts of the
# package registries that its own programs are set to. `--network allow` lets these through; no
# registry is named anywhere in agent-vm.
{
  cat /etc/apt/sources.list /etc/apt/sources.list.d/* /etc/apt/mirrors/*
  npm config get registry
  python3 -m pip config list
  python3 -c 'from pip._internal.models.index import PyPI as index
print(index.simple_url, f"https://{index.file_storage_domain}/")'  # unless pip is told otherwise
  cat ~/.cargo/config.toml /etc/uv/uv.toml ~/.config/uv/uv.toml
  go env GOPROXY
  go env GOSUMDB | sed 's#^#https://#'
} 2> /dev/null | grep -oE 'https?://[^/ ",|'"'"']+' | sed -E 's#.*(//|@)##' | sort -u | tr '\n' ' '
