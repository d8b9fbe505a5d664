#!/usr/bin/env bash
set -euo pipefail
usage='Runs cpsc_jax on a slice of Cloud TPU VMs: creates or reuses the slice, installs this checkout on all workers,
runs the same command on each, follows the log of worker 0, restarts after a preemption, copies the results back.

  launch/tpu_pod.sh --name NAME --zone ZONE --type v5litepod-16 [OPTIONS] -- --config configs/cifar100.py ...
  launch/tpu_pod.sh --name NAME --zone ZONE --delete

  --runtime V   software version of the VMs (v2-alpha-tpuv5-lite; see gcloud compute tpus tpu-vm versions list)
  --project P   Cloud project (the default of gcloud)
  --spot        preemptible, at a lower price; a preempted slice is deleted with its disks, so that the run needs a bucket
  --bucket B    mount the bucket B on every worker, as /mnt/cpsc_jax; a slice of several workers needs one, because all
                of them must see the folder of the run. Create it with --enable-hierarchical-namespace: checkpoints are
                renamed when they are complete. The VMs need gcsfuse
  --workdir W   folder of the run on the workers (/mnt/cpsc_jax/run with a bucket, else cpsc_jax_run)
  --back DIR    folder of this machine to which the results are copied (runs/NAME)
  --restarts N  how often the run is restarted (20)
  --delete      delete the slice, after the run if there is one
  --dry-run     only print the commands

The arguments after -- are those of cpsc-jax; the data must be in a folder that the workers can read, such as
--config.dataset.data_dir=/mnt/cpsc_jax/data. Ctrl-C stops following the log, not the run; the same command follows it
again.'

name='' zone='' type='' runtime=v2-alpha-tpuv5-lite bucket='' workdir='' back='' restarts=20
project=() spot=() delete=false dry=false
while [ $# -gt 0 ]; do
  case "$1" in
    --name) name=$2; shift ;;
    --zone) zone=$2; shift ;;
    --type) type=$2; shift ;;
    --runtime) runtime=$2; shift ;;
    --project) project=(--project="$2"); shift ;;
    --bucket) bucket=$2; shift ;;
    --workdir) workdir=$2; shift ;;
    --back) back=$2; shift ;;
    --restarts) restarts=$2; shift ;;
    --spot) spot=(--spot) ;;
    --delete) delete=true ;;
    --dry-run) dry=true ;;
    --) shift; break ;;
    -h | --help) echo "$usage"; exit 0 ;;
    *) echo "tpu_pod.sh: unknown option '$1'; --help lists all options" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
  echo "tpu_pod.sh: --name and --zone are required; --help explains them" >&2
  exit 2
fi
if [ $# -gt 0 ] && [ -z "$type" ]; then
  echo "tpu_pod.sh: --type is required, such as v5litepod-16" >&2
  exit 2
fi
if [ $# -gt 0 ] && [ ${#spot[@]} -gt 0 ] && [ -z "$bucket$workdir" ]; then
  echo "tpu_pod.sh: --spot needs --bucket, or --workdir in a folder that outlasts the slice: a preempted slice is deleted" \
    "with its disks" >&2
  exit 2
fi
mount=/mnt/cpsc_jax
if [ -z "$workdir" ]; then
  workdir=cpsc_jax_run
  [ -z "$bucket" ] || workdir=$mount/run
fi
back=${back:-runs/$name}
here=$(cd "$(dirname "$0")/.." && pwd)

tpu() {
  local verb=$1
  shift
  if $dry; then
    echo "gcloud compute tpus tpu-vm $verb" "$@" "--zone=$zone" "${project[@]}" >&2
  else
    gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" "${project[@]}"
  fi
}
on() { # on WORKER COMMAND
  tpu ssh "$name" --worker="$1" --command="$2"
}
state() {
  $dry || gcloud compute tpus tpu-vm describe "$name" --zone="$zone" "${project[@]}" --format='value(state)' 2>/dev/null ||
    true
}

ensure() {
  local now
  while now=$(state); do
    case "$now" in
      READY) return ;;
      '') tpu create "$name" --accelerator-type="$type" --version="$runtime" "${spot[@]}" ;;
      CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING) sleep "${TPU_POD_POLL:-15}" ;;
      *)
        echo "tpu_pod.sh: $name is $now; creating it again"
        tpu delete "$name" --quiet
        ;;
    esac
    if $dry; then return; fi
  done
}

# set -e has no effect in a function whose failure is asked for, so that this returns at what fails.
install() {
  local archive code=0
  archive=$(mktemp -d)/cpsc_jax.tar.gz
  git -C "$here" archive --format=tar.gz -o "$archive" HEAD || exit
  tpu scp "$archive" "$name:" --worker=all || code=$?
  rm -r "$(dirname "$archive")"
  [ "$code" = 0 ] || return "$code"
  on all "mkdir -p cpsc_jax && tar xzf cpsc_jax.tar.gz -C cpsc_jax && python3 -m pip install -q --user uv &&
    (test -d venv || ~/.local/bin/uv venv -q --python 3.12 venv) &&
    ~/.local/bin/uv pip install -q --python venv/bin/python -e 'cpsc_jax[tpu]'" || return
  if [ -n "$bucket" ]; then
    on all "mountpoint -q $mount || { command -v gcsfuse >/dev/null || { echo 'install gcsfuse on the workers' >&2; exit 2; }
      sudo mkdir -p $mount && sudo chown \$USER $mount && gcsfuse --implicit-dirs $bucket $mount; }"
  fi
}

# The run writes its exit code to a file when it ends; while the process exists and the file does not, it is running.
start() {
  local command
  command="$(printf '%q ' venv/bin/python -m cpsc_jax.main --workdir "$workdir" "$@")"
  on all "rm -f cpsc_jax.exit; (setsid nohup sh -c $(printf '%q' "$command >>cpsc_jax.log 2>&1; echo \$? >cpsc_jax.exit") \
    </dev/null >/dev/null 2>&1 & echo \$! >cpsc_jax.pid)"
}
running() {
  $dry || [ "$(on 0 '! test -e cpsc_jax.exit && kill -0 $(cat cpsc_jax.pid) && echo running' 2>/dev/null | tail -n 1)" = running ]
}
follow() { # prints the log of worker 0 until the run ends and sets $code to its exit code, 75 if there is none
  on 0 'tail -n +1 -F --pid=$(cat cpsc_jax.pid) cpsc_jax.log' || true
  code=$(on 0 'cat cpsc_jax.exit' 2>/dev/null | tail -n 1) || true
  if $dry; then code=0; fi
  [[ "$code" =~ ^[0-9]+$ ]] || code=75
}

if [ $# -gt 0 ]; then
  for ((attempt = 0; ; attempt++)); do
    ensure
    code=0
    if $dry || ! running; then
      install && start "$@" || code=$?
    fi
    if [ "$code" = 0 ]; then
      follow
    elif [ "$code" != 2 ]; then
      code=75 # the slice was preempted meanwhile, or does not answer yet
      sleep "${TPU_POD_POLL:-15}"
    fi
    case $code in
      0 | 2 | 3 | 130) break ;;
    esac
    if [ "$attempt" -ge "$restarts" ]; then
      echo "tpu_pod.sh: giving up after $restarts restarts; the same command resumes" >&2
      break
    fi
    echo "tpu_pod.sh: the run ended with exit code $code; restarting it"
  done
  mkdir -p "$back"
  if ! tpu scp "$name:$workdir" "$back" --worker=0 --recurse; then
    echo "tpu_pod.sh: nothing was copied from $name:$workdir; the slice is left as it is" >&2
    if [ "$code" = 0 ]; then code=1; fi
    exit "$code"
  fi
fi
if $delete; then tpu delete "$name" --quiet; fi
exit "${code:-0}"
