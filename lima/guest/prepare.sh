#!/bin/bash
# Sent by a run into its VM, as its user: makes it a place to work, from the files of ~/.agent-vm.
# shellcheck disable=SC1091
set -eu -o pipefail
cd ~/.agent-vm
umask 077
printf '[include]\n\tpath = ~/.agent-vm/gitconfig\n' >> ~/.gitconfig

# Deep-merges the JSON on stdin into a file that may not exist yet.
merge() {
  [ -s "$1" ] || { cat > "$1"; return; }
  merged=$(jq -s '.[0] * .[1]' "$1" /dev/stdin)
  echo "$merged" > "$1"
}
merge ~/.claude.json < claude.json
merge ~/.claude/settings.json <<< '{"skipDangerousModePermissionPrompt": true}'
chmod 600 ~/.claude.json
echo "$(< briefing)" >> ~/.claude/CLAUDE.md

# Under a locale that the guest lacks every shell warns.
said=$( (. ./env; locale) 2>&1) || true
case $said in
  *'annot set LC_'* | *'annot change locale'*)
    sed -E -i '/^export (LANG|LC_[A-Z]+)=/d' env
    echo 'export LC_ALL=C.UTF-8' >> "./env" ;;
esac
