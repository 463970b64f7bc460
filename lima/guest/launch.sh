#!/bin/bash -l
# Runs what it is given in the project, with the environment of the host's terminal. Not `exec`: a
# shell turns death by a signal into a status, and syncs so that the VM can be cut off after it. At
# a terminal the agent is a job: Ctrl-Z stops it alone, and as nobody can resume it, it goes on.
# usage: launch.sh PROJECT PROGRAM ARGUMENT…
# shellcheck disable=SC1090,SC2015,SC2016
. ~/.agent-vm/env
. ~/.agent-vm/credential
infocmp > /dev/null 2>&1 || export TERM=xterm-256color
cd -- "$1" || exit 125
shift
command -v -- "$1" > /dev/null || set -- sh -c 'echo "$0: not found" >&2; exit 127' "$1"
trap : HUP TERM  # of an agent's `kill 0`
[ -t 0 ] && set -m || trap : INT
"$@"
status=$?
go_on() { [ -z "$(jobs -s)" ] || { fg > /dev/null; status=$?; go_on; }; }  # a loop would be stopped
go_on
sync
echo "$status" > ~/.agent-vm/status
[ -t 0 ] || { (sleep 3; kill "$PPID") < /dev/null > /dev/null 2>&1 & }  # pipes held by what is left
exit "$status"
