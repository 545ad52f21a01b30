#!/usr/bin/env bash
# Verifies a running platform from outside: health, models, queue, one real detection and one real job, through both ports.
set -uo pipefail

usage() {
  cat <<'TEXT'
deploy/verify.sh [--vision HOST:PORT] [--queue HOST:PORT] [--wait SECONDS] [--image FILE]

  --vision   the vision server      (localhost:2001; or VERIFY_VISION)
  --queue    the queue server       (localhost:2003; or VERIFY_QUEUE)
  --wait     how long the servers may take to become ready: models load for minutes (600; or VERIFY_WAIT)
  --image    a picture in which the default detector finds something (a sample that suits it; or VERIFY_IMAGE)

Needs bash, curl and python3. Ends with 0: all is right; 1: something is not, each line with ✗ says what and the cure; 2: it could
not be tried (an unknown option, a missing program or picture).
TEXT
}

vision=${VERIFY_VISION:-localhost:${VISION_SERVICE_PORT:-2001}}
queue=${VERIFY_QUEUE:-localhost:${QUEUE_WORKER_PORT:-2003}}
wait_s=${VERIFY_WAIT:-600}
image=${VERIFY_IMAGE:-}
containers=${CONTAINER_PREFIX:-team10}

readonly CALL_S=10    # a look at the health of a server
readonly DETECT_S=60  # the first image of a GPU may have to wait for a batch size that is compiled
readonly WORKER_S=30  # a worker registers itself shortly after the queue server is there
readonly JOB_S=120    # from the submission to the end
readonly PROGRESS_S=5 # between two percentages of a model that loads

while [ $# -gt 0 ]; do
  case $1 in
    --vision | --queue | --wait | --image)
      [ $# -ge 2 ] || { echo "$1 needs a value." >&2; exit 2; }
      case $1 in
        --vision) vision=$2 ;;
        --queue) queue=$2 ;;
        --wait) wait_s=$2 ;;
        --image) image=$2 ;;
      esac
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    *) echo "Unknown option $1." >&2; usage >&2; exit 2 ;;
  esac
done
[[ $wait_s =~ ^[0-9]+$ ]] || { echo "--wait is $wait_s: whole seconds are wanted." >&2; exit 2; }
for program in curl python3 base64; do
  command -v "$program" >/dev/null || { echo "$program is missing: install it on the machine that verifies." >&2; exit 2; }
done

[[ $vision == *://* ]] || vision=http://$vision
[[ $queue == *://* ]] || queue=http://$queue
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
body=$work/body
failures=0
lines=0

# read_answer WHAT → $text and the exit code of answers.py; 1 with the answer itself where it is no JSON of ours.
read_answer() {
  local code
  text=$(python3 -IS "$here/ci/answers.py" "$1" <"$body" 2>"$work/trouble")
  code=$?
  if [ -s "$work/trouble" ]; then
    text="an answer that is not ours: $(head -c 200 "$body" | tr -d '\r\n')"
    return 1
  fi
  return $code
}

# fetch SECONDS URL [CURL ARGUMENTS…] → $status (000: no answer, with $text saying why) and the file $body.
fetch() {
  local seconds=$1 url=$2
  shift 2
  : >"$body"
  status=$(curl --silent --show-error --noproxy '*' --connect-timeout 5 --max-time "$seconds" \
    --output "$body" --write-out '%{http_code}' "$@" "$url" 2>"$work/curl")
  [ "$status" = 000 ] && text="no answer from $url: $(sed -e 's/^curl: ([0-9]*) //' -e q "$work/curl")"
}

now_ms() { local now=${EPOCHREALTIME/[.,]/}; echo $((now / 1000)); }
begin() { began_ms=$(now_ms); }
line() {
  local took_ms=$(($(now_ms) - began_ms))
  printf '%s %-24s %s  [%d.%d s]\n' "$1" "$2" "$3" $((took_ms / 1000)) $((took_ms % 1000 / 100))
}
passed() { lines=$((lines + 1)); line ✓ "$1" "$2"; }
failed() {
  lines=$((lines + 1)) failures=$((failures + 1))
  line ✗ "$1" "$2"
  printf '    cure: %s\n' "$3"
}
untried() { lines=$((lines + 1)); printf -- '– %-24s not tried: %s\n' "$1" "$2"; }

# Waits until GET /health says 200, at most until $until; tells now and then what is missing. 1: it does not, $text says why.
await() {
  local name=$1 url=$2 told='' told_at=0
  while :; do
    fetch "$CALL_S" "$url/health"
    case $status in
      200) return 0 ;;
      000) ;;
      503)
        read_answer why
        if [ "$name" = vision ]; then
          local why=$text
          fetch "$CALL_S" "$url/info"
          if [ "$status" = 200 ]; then
            read_answer loading
            [ $? -eq 3 ] && return 1 # a model that has failed stays so; the others are ready
          fi
          [ -n "$text" ] || text=$why
        fi
        ;;
      *) text="GET $url/health says $status: is that our server?"; return 1 ;;
    esac
    if [ $SECONDS -ge "$until" ]; then
      [ "$wait_s" -gt 0 ] && text="after $wait_s s: $text"
      return 1
    fi
    # Another state is told at once, another percentage now and then.
    if [ "${text//[0-9]/}" != "${told//[0-9]/}" ] || { [ "$text" != "$told" ] && [ $((SECONDS - told_at)) -ge $PROGRESS_S ]; }; then
      printf '… %-24s %s  [%d s]\n' "$name" "$text" "$SECONDS"
      told=$text told_at=$SECONDS
    fi
    sleep 0.5
  done
}

# details NAME URL CONTAINER: GET /health/detailed.
details() {
  begin
  fetch "$CALL_S" "$2/health/detailed"
  if [ "$status" = 000 ]; then
    untried "$1 /health/detailed" "the $1 server does not answer"
  elif read_answer checks; then
    passed "$1 /health/detailed" "$text"
  else
    failed "$1 /health/detailed" "$text" "docker logs --tail 100 $containers-$3"
  fi
}

echo "Verifying vision $vision, queue $queue; the servers have $wait_s s to become ready."
until=$((SECONDS + wait_s))

vision_ready=no
begin
if await vision "$vision"; then
  vision_ready=yes
  passed "vision /health" "SERVING"
else
  failed "vision /health" "$text" "docker ps --all --filter name=$containers-vision; docker logs --tail 100 $containers-vision
          (a model that failed: its reason is in /info; too little time: --wait; memory or GPU: ai4thai doctor)"
fi

queue_ready=no
begin
if await queue "$queue"; then
  queue_ready=yes
  passed "queue /health" "SERVING"
else
  failed "queue /health" "$text" "docker ps --all --filter name=$containers; docker logs --tail 100 $containers-queue, then $containers-redis"
fi

details vision "$vision" vision
details queue "$queue" queue

begin
fetch "$CALL_S" "$vision/info"
if [ "$status" = 000 ]; then
  untried "vision /info" "the vision server does not answer"
elif [ "$status" = 200 ] && read_answer info; then
  passed "vision /info" "$text"
elif [ "$status" = 404 ]; then
  failed "vision /info" "what answers at $vision is no vision server" "--vision HOST:PORT, or VISION_SERVICE_PORT; the queue server is at $queue"
else
  [ "$status" = 200 ] || text="GET /info says $status"
  failed "vision /info" "$text" "the names in VISION_DETECTOR and VISION_DESCRIBER, access to Hugging Face (HF_TOKEN), room on the disk and the GPU;
          docker logs $containers-vision 2>&1 | grep model"
fi
labels=
[ "$status" = 200 ] && read_answer known && labels=$text

worker_there=no
begin
worker_until=$((SECONDS + (wait_s < WORKER_S ? wait_s : WORKER_S)))
while :; do
  fetch "$CALL_S" "$queue/queue/stats"
  if [ "$status" = 200 ] && read_answer stats; then
    worker_there=yes
    break
  fi
  [ "$status" = 200 ] || [ "$status" = 000 ] || { read_answer refusal; text="GET /queue/stats says $status: $text"; }
  [ $SECONDS -lt $worker_until ] && [ $queue_ready = yes ] || break
  sleep 0.5
done
if [ $worker_there = yes ]; then
  passed "queue /queue/stats" "$text"
elif [ "$status" = 000 ]; then
  untried "queue /queue/stats" "the queue server does not answer"
else
  failed "queue /queue/stats" "$text" "docker compose up -d worker; docker logs --tail 100 $containers-worker"
fi

# The shipped detector knows drawn shapes; the others are thought to know what is in a street (Ultralytics' sample bus.jpg, smaller).
if [ -z "$image" ]; then
  case " $labels " in
    *' circle '*) image=$here/../clients/ai4thai/samples/scene-01.jpg ;;
    *) image=$here/ci/street.jpg ;;
  esac
fi
[ -r "$image" ] || { echo "The picture $image cannot be read: name one with --image." >&2; exit 2; }
{ printf '{"image": {"content": "'; base64 <"$image" | tr -d '\n'; printf '"}}'; } >"$work/detect.json"
{
  printf '{"request_id": "verify-%s-%s-%s", "client": "verify", "priority": "PRIORITY_INTERACTIVE", "max_attempts": 1, ' "$(date +%s)" $$ $RANDOM
  printf '"work": {"detect": {"images": [{"content": "'; base64 <"$image" | tr -d '\n'; printf '"}]}}}'
} >"$work/job.json"
readonly AS_JSON='content-type: application/json'

if [ $vision_ready = yes ]; then
  begin
  fetch "$DETECT_S" "$vision/v1/vision:detect" --header "$AS_JSON" --data-binary "@$work/detect.json"
  if [ "$status" = 200 ] && read_answer detection; then
    passed "vision detection" "$text"
  elif [ "$status" = 200 ]; then
    failed "vision detection" "$text in ${image##*/}" "a picture in which the detector must find something: --image FILE (VERIFY_IMAGE); else the weights are wrong"
  else
    [ "$status" = 000 ] || { read_answer refusal; text="$status: $text"; }
    failed "vision detection" "$text" "docker logs --tail 100 $containers-vision; nvidia-smi; docker restart $containers-vision"
  fi
else
  untried "vision detection" "the vision server is not ready"
fi

# One job; deleted when it has succeeded, cancelled when it has not ended.
try_job() {
  fetch "$DETECT_S" "$queue/v1/jobs" --header "$AS_JSON" --data-binary "@$work/job.json"
  if [ "$status" != 200 ]; then
    [ "$status" = 000 ] || { read_answer refusal; text="refused with $status: $text"; }
    return 1
  fi
  read_answer job_id || return 1
  local job=$text until=$((SECONDS + JOB_S)) code
  while :; do
    fetch "$CALL_S" "$queue/v1/jobs/$job"
    code=3
    [ "$status" = 200 ] && { read_answer job; code=$?; }
    [ $code -ne 3 ] && break
    if [ $SECONDS -ge $until ]; then
      local last=$text
      fetch "$CALL_S" "$queue/v1/jobs/$job:cancel" --header "$AS_JSON" --data '{}'
      text="job $job, after $JOB_S s: $last"
      return 1
    fi
    sleep 0.2
  done
  [ $code -eq 0 ] || { text="job $job: $text"; return 1; }
  local good=$text
  fetch "$CALL_S" "$queue/v1/jobs/$job" --request DELETE
  text=$good
}

if [ $queue_ready = yes ] && [ $worker_there = yes ] && [ $vision_ready = yes ]; then
  begin
  if try_job; then
    passed "queue job" "$text"
  else
    failed "queue job" "$text" "docker logs --tail 100 $containers-worker; is QUEUE_VISION_ADDRESS right? is the queue paused (ai4thai queue stats)?"
  fi
else
  why=
  [ $vision_ready = yes ] || why="the vision server is not ready"
  [ $worker_there = yes ] || why="no worker is alive"
  [ $queue_ready = yes ] || why="the queue server is not ready"
  untried "queue job" "$why"
fi

if [ $failures -eq 0 ]; then
  echo "All $lines are right, after $SECONDS s."
else
  echo "$failures of $lines are not right, after $SECONDS s."
  exit 1
fi
