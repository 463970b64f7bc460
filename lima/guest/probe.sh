#!/bin/bash
# Sent by a run into its VM, as its user, before the agent starts: what the sides of the run must
# refuse is seen to be refused, from in here. Silent then; else it says what is not, and fails.
# ~/.agent-vm/sides has: broker (a URL, or nothing), url, repo and is_readonly of the GitHub proxy.
# What carries the probe's secret is judged like the agent's own, but neither passed on nor counted.
# shellcheck disable=SC1091,SC2154
set -u
cd ~/.agent-vm || exit
. ./env  # the agent's
. ./sides
refused() {  # WHAT WORDS-OF-THE-REFUSAL CURL-ARGUMENT...
  answer=$(curl -sS -m 20 -H 'Content-Type: application/json' \
    -H 'Accept: application/json, text/event-stream' "${@:3}" 2>&1)
  case $answer in
    *"$2"*) ;;
    *) echo "$1 is not refused as it should be: ${answer:0:300}"; exit 1 ;;
  esac
}
call() {  # TOOL ARGUMENTS-AS-JSON
  echo '{"jsonrpc": "2.0", "id": 1, "method": "tools/call",' \
    '"params": {"name": "'"$1"'", "arguments": '"$2"'}}'
}

[ -z "$broker" ] ||
  refused 'a wrong placeholder' 'not the placeholder' -H 'x-api-key: wrong' -d '{}' \
    "$broker/v1/messages"

[ -n "$url" ] || exit 0
sed 's/$/-not/' probe-header > wrong-header  # in files: a secret must not be in an argv
ours=(-H @probe-header)
served="only $repo is served here"
foreign=$(call get_file_contents '{"owner": "agent-vm-probe", "repo": "other", "path": "x"}')
other="$url/git/agent-vm-probe/other.git/info/refs?service=git-upload-pack"
refused 'another repository over MCP' "$served" "${ours[@]}" "$url/mcp" -d "$foreign"
refused 'another repository over git' "$served" "${ours[@]}" "$other"
refused 'a wrong secret' 'secret is missing or wrong' -H @wrong-header "$url/mcp" -d "$foreign"
[ -n "$is_readonly" ] || exit 0
write=$(call create_branch '{"branch": "agent-vm-probe"}')
push="$url/git/$repo.git/info/refs?service=git-receive-pack"
refused 'a write over MCP' 'the policy is read-only' "${ours[@]}" "$url/mcp" -d "$write"
refused 'a push' 'the policy is read-only' "${ours[@]}" "$push"
