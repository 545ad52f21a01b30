#!/bin/sh
# What the containers of Redis run, compose.yaml's and those of deploy/kubernetes: `redis.sh serve`, its health check `redis.sh health`,
# and `redis.sh check`, which refuses a password that is missing before anything starts.
#
# The password goes to the server by standard input, and to the client too: a command line is shown by `ps` and `docker inspect`.
set -eu

password_file="${AI4THAI_SECRETS_DIR:-/run/secrets}/redis_password"
port="${REDIS_PORT:-6379}"

refuse() {
  echo "Redis does not start: $1" >&2
  exit 1
}

# The password as the servers read it (blanks and line ends around it do not count), each byte as \xNN, so that nothing in it can
# end the quotes it is put into.
read_password() {
  [ -e "$password_file" ] || return 0
  [ -f "$password_file" ] || refuse "REDIS_PASSWORD_FILE named no file, and Docker made a folder in its place. Remove the folder, and write the password into a file of that name."
  [ -r "$password_file" ] || refuse "its user ($(id -u)) may not read the password's file. Say chmod 644 FILE, and chmod 700 for the folder that it lies in."
  [ "$(grep -c '[^[:space:]]' "$password_file")" -le 1 ] || refuse "the password's file has several lines. Write the password into one."
  sed -e 's/^[[:space:]]*//' -e 's/[[:space:]]*$//' "$password_file" | tr -d '\n' | od -An -v -tx1 | tr -d '\n' | sed 's/ /\\x/g'
}

check() {
  password="$(read_password)"
  if [ -z "$password" ] && [ "${AUTHENTICATION:-optional}" = required ]; then
    refuse "its password is empty, which only Compose's profile cpu allows. Write one (mkdir -pm 700 secrets; openssl rand -hex 32 > secrets/redis-password) and name it, here or in .env: REDIS_PASSWORD_FILE=./secrets/redis-password; on Kubernetes it is redis_password in the secret ai4thai-secrets."
  fi
}

case "${1:-}" in
  check)
    check
    echo "Redis' password can be read."
    ;;
  serve)
    check
    shift
    settings=""
    [ -z "$password" ] || settings="requirepass \"$password\""
    # protected-mode would shut the other containers out where there is no password; the network lets nobody else in.
    exec "$(command -v valkey-server || command -v redis-server)" - --port "$port" --protected-mode no "$@" <<EOF
$settings
EOF
    ;;
  health)
    password="$(read_password)"
    {
      [ -z "$password" ] || printf 'AUTH "%s"\n' "$password"
      echo PING
    } | "$(command -v valkey-cli || command -v redis-cli)" -p "$port" 2>&1 | grep -qx PONG
    ;;
  *)
    echo "usage: redis.sh check | serve [OPTIONS] | health" >&2
    exit 2
    ;;
esac
