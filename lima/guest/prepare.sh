#!/bin/bash
# Sent by a run into its VM, as its user: makes it a place to work, from the files of ~/.agent-vm.
# shellcheck disable=SC1091
set -eu -o pipefail
cd ~/.agent-vm
mkdir -p ~/.claude/projects
bash mounts.sh
umask 077  # not for the folders on the way to a mount

. ./git-settings
zone=/usr/share/zoneinfo/$(cat zone)
[ ! -f "$zone" ] || sudo ln -sf "$zone" /etc/localtime

# Deep-merges the JSON on stdin into a file that may not exist yet.
merge() {
  [ -s "$1" ] || echo '{}' > "$1"
  jq -s '.[0] * .[1]' "$1" /dev/stdin > merged
  cat merged > "$1"
  rm merged
}
merge ~/.claude.json < claude.json
merge ~/.claude/settings.json <<< '{"skipDangerousModePermissionPrompt": true}'
chmod 600 ~/.claude.json
cat briefing >> ~/.claude/CLAUDE.md

# Under a locale that the guest lacks every shell warns.
said=$( (. ./env; locale) 2>&1) || true
case $said in
  *'annot set LC_'* | *'annot change locale'*)
    sed -E -i '/^export (LANG|LC_[A-Z]+)=/d' env
    echo 'export LC_ALL=C.UTF-8' >> "./env" ;;
esac
