#!/usr/bin/env bash
# How long a newcomer waits: a fresh clone with an empty cache, one command, the first answer.
#
# Clones HEAD into a temporary directory, keeps every cache and state of CALM in there too, and measures
#   make serve, first start   environment, dependencies, weights, ready, first answer
#   make serve, second start  everything is there
#   make serve, offline       no network: a network namespace without one where the system allows it, else
#                             proxies and package indexes that point to a closed port
#   make test                 with the development dependencies
# pip's cache is empty too; pip's and npm's configuration is the user's own.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: benchmarks/fresh.sh [--no-test] [--keep]

  --no-test   leave `make test` out
  --keep      keep the clone and the logs, and say where they are

Prints a small table; exit code 0 when every step worked. `make bench-fresh` runs it.
HELP
}

with_test=yes keep=no
for argument in "$@"; do
  case $argument in
    --no-test) with_test=no ;;
    --keep) keep=yes ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done

for tool in git make curl python3; do
  command -v "$tool" >/dev/null || { echo "fresh.sh needs $tool" >&2; exit 2; }
done

repository=$(cd "$(dirname "$0")/.." && pwd)
root=$(mktemp -d "${TMPDIR:-/tmp}/calm-fresh.XXXXXX")
clone=$root/calm
mkdir -m 700 "$root/run"
server=0 namespace=0 isolation=
declare -a rows=() net=()

cleanup() {
  [ "$server" = 0 ] || kill -KILL -- "-$server" 2>/dev/null || true
  [ "$namespace" = 0 ] || kill "$namespace" 2>/dev/null || true
  if [ "$keep" = yes ]; then echo "kept: $root"; else rm -rf "$root"; fi
}
trap cleanup EXIT

now() { date +%s.%N; }
since() { python3 -c 'import sys; print(f"{float(sys.argv[2]) - float(sys.argv[1]):.1f}")' "$1" "$(now)"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
row() { rows+=("$(printf '%-30s %14s %14s' "$1" "$2" "$3")"); }

fail() {
  echo "FAIL: $1" >&2
  echo "the last lines of $2:" >&2
  tail -n 20 "$2" >&2
  exit 1
}

# An environment of its own: what CALM caches, keeps and is configured with lies under $root. Both of these
# replace the (sub)shell they are called in, so that a job's process id is the command's.
fresh() {
  exec env -u CALM_CONFIG XDG_CACHE_HOME="$root/cache" XDG_CONFIG_HOME="$root/config" \
    XDG_STATE_HOME="$root/state" XDG_RUNTIME_DIR="$root/run" PIP_CACHE_DIR="$root/cache/pip" \
    CALM_CACHE_DIR="$root/cache/calm" CALM_STATE_DIR="$root/state/calm" "$@"
}

offline() {
  local closed=http://127.0.0.1:9
  fresh HTTP_PROXY="$closed" HTTPS_PROXY="$closed" ALL_PROXY="$closed" http_proxy="$closed" \
    https_proxy="$closed" all_proxy="$closed" NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost \
    PIP_INDEX_URL="$closed/simple" npm_config_registry="$closed" HF_ENDPOINT="$closed" "$@"
}

# A network namespace with nothing but loopback; `net` is then the prefix that enters it.
isolate() {
  local hold='import fcntl, pathlib, socket, struct, time
fcntl.ioctl(socket.socket(type=socket.SOCK_DGRAM), 0x8914, struct.pack("16sh", b"lo", 0x41))  # up
pathlib.Path("up").touch()
time.sleep(3600)'
  isolation="proxies and indexes point to a closed port"
  unshare --net --map-root-user true 2>/dev/null || return 0
  (cd "$root" && exec unshare --net --map-root-user python3 -c "$hold") &
  namespace=$!
  for _ in $(seq 100); do
    [ -e "$root/up" ] && break
    sleep 0.05
  done
  [ -e "$root/up" ] || return 0
  net=(nsenter --target "$namespace" --user --net --preserve-credentials)
  isolation="a network namespace with nothing but loopback"
}

# ask PORT: the first answer, as the README's curl line asks for it
ask() {
  "${net[@]}" curl -sS --fail --max-time 120 "http://127.0.0.1:$1/v1/chat/completions" \
    -H 'Content-Type: application/json' -d '{"model": "calm", "max_tokens": 16, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
}

# start NAME LIMIT_S ENVIRONMENT: make serve until ready and the first answer, then stop it
start() {
  local name=$1 limit_s=$2 environment=$3 log="$root/${1// /-}.log" port began ready answered
  port=$(free_port)
  : >"$log"
  began=$(now)
  "$environment" setsid "${net[@]}" make -C "$clone" serve "PORT=$port" >"$log" 2>&1 &
  server=$!
  until grep -q "CALM serves at" "$log"; do
    kill -0 "$server" 2>/dev/null || fail "$name: make serve ended before it was ready" "$log"
    [ "$(since "$began" | cut -d. -f1)" -lt "$limit_s" ] || fail "$name: not ready after $limit_s s" "$log"
    sleep 0.05
  done
  ready=$(since "$began")
  ask "$port" >"$root/answer.json" || fail "$name: no answer" "$log"
  answered=$(since "$began")
  python3 -c 'import json, sys; assert json.load(open(sys.argv[1]))["choices"][0]["message"]["content"].strip()' \
    "$root/answer.json" || fail "$name: the answer is empty" "$root/answer.json"
  stop "$name" "$port" "$log"
  row "$name" "$ready" "$answered"
}

# stop NAME PORT LOG: SIGTERM as a service manager sends it; nothing of the group may be left
stop() {
  local name=$1 port=$2 log=$3 began
  began=$(now)
  kill -TERM -- "-$server"
  while kill -0 -- "-$server" 2>/dev/null; do
    [ "$(since "$began" | cut -d. -f1)" -lt 20 ] || fail "$name: still there 20 s after SIGTERM" "$log"
    sleep 0.05
  done
  wait "$server" || true
  server=0
  if "${net[@]}" curl -s --max-time 1 "http://127.0.0.1:$port/healthz" >/dev/null; then
    fail "$name: something still answers on port $port" "$log"
  fi
  grep -lsF "$root/" /proc/[0-9]*/cmdline >"$root/left" || true
  [ ! -s "$root/left" ] || fail "$name: processes are left behind" "$root/left"
}

measure_test() {
  local log="$root/make-test.log" began
  began=$(now)
  (fresh make -C "$clone" test) >"$log" 2>&1 || fail "make test" "$log"
  row "make test" "" "$(since "$began")"
  grep -E '^[0-9]+ passed' "$log" | tail -n 1 || true
}

echo "cloning HEAD ($(git -C "$repository" rev-parse --short HEAD)) into $clone"
git clone -q --no-hardlinks "$repository" "$clone"
echo "first start: environment, dependencies and weights, all from empty caches"
start "first start" 1800 fresh
echo "second start"
start "second start" 120 fresh
isolate
echo "offline start: $isolation"
start "offline start" 120 offline
net=()
if [ "$with_test" = yes ]; then
  echo "make test"
  measure_test
fi

echo
echo "$(uname -sr), $(nproc) cores, $(python3 --version); weights and environment: $(du -sh "$root" | cut -f1)"
printf '%-30s %14s %14s\n' "seconds" "ready" "first answer"
printf '%s\n' "${rows[@]}"
