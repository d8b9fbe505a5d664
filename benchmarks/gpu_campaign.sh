#!/bin/bash
# benchmarks/gpu_campaign.sh FOLDER [--data DIR] [--plan gpu_cifar] [--from PARCEL] [--budget 9m] [--runs DIR] [--toy]
#
# One call of a campaign on a machine with a GPU; call it until it says that all rows are done. The first call on a
# machine measures speed there and compares the methods with the CPU (benchmarks/gpu.py), the latter beside what every
# call does: it carries out benchmarks/plans/PLAN.py in runs/gpu, or in DIR, until the budget, which a later call on the
# same machine resumes. FOLDER gets gpu.json, methods.json, the table and a parcel of at most 60 MiB, in files of at
# most 15 MiB, with which --from goes on elsewhere (benchmarks/parcel.py).
# Packages that the machine lacks are taken from ./wheels, if there is such a folder. In a copy without .git, COMMIT is to
# name the commit. --toy is a rehearsal on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 budget=9m data= plan=gpu_cifar from= runs=runs/gpu toy=
shift
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift 2 ;;
    --plan) plan=$2; shift 2 ;;
    --from) from=$2; shift 2 ;;
    --budget) budget=$2; shift 2 ;;
    --runs) runs=$2; shift 2 ;;
    --toy) toy=--toy; shift ;;
    *) echo "gpu_campaign.sh: no option $1; there are --data, --plan, --from, --budget, --runs and --toy" >&2; exit 2 ;;
  esac
done
began=$SECONDS
case $budget in
  *[0-9]s) limit=${budget%s} ;;
  *[0-9]m) limit=$((${budget%m} * 60)) ;;
  *) echo "gpu_campaign.sh: --budget is '$budget'; expected a number and s or m, such as 9m" >&2; exit 2 ;;
esac
if [ ! -f "benchmarks/plans/$plan.py" ]; then
  echo "gpu_campaign.sh: there is no benchmarks/plans/$plan.py; expected gpu_cifar or gpu_cifar100" >&2
  exit 2
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
. benchmarks/packages.sh
export PYTHONPATH=. PYTHONUNBUFFERED=1
log() { echo "[$((SECONDS - began)) s] $*"; }
if [ -n "$from" ] && [ ! -d "$runs" ]; then
  python3 -m benchmarks.parcel unpack "$from" "$runs"
  log "unpacked $from"
fi
mkdir -p "$runs"
if [ ! -f "$runs/gpu.json" ]; then
  # What is wrong is in gpu.json and methods.json; the campaign goes on, so that a call is not lost.
  python3 -m benchmarks.gpu --out "$runs/gpu.json" --methods= --budget "$((limit * 6 / 10))s" $toy ||
    log "gpu.json names what is wrong"
  log "measured"
  methods=()
  if [ -n "$toy" ]; then methods=(--methods dafl); fi
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.15 python3 -m benchmarks.gpu --out "$runs/methods.json" --pairs= \
    --budget "$((limit * 6 / 10))s" $toy "${methods[@]}" >"$runs/methods.log" 2>&1 &
fi
# Two runs share the card, as the one compiles while the other trains; a card's memory is divided by hand.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.35
flags=()
if [ -n "$data" ]; then flags+=("--config.dataset.data_dir=$data"); fi
if [ -n "$toy" ]; then plan=gpu_toy; fi
plan=benchmarks/plans/$plan.py
left=$((limit - (SECONDS - began)))
status=0
if [ "$left" -gt 0 ]; then
  python3 -m benchmarks.table "$plan" --out "$runs" --jobs 2 --budget "${left}s" "${flags[@]}" || status=$?
  log "table"
fi
wait
cp "$runs"/*.json "$runs"/*.md "$out" 2>/dev/null || true
python3 -m benchmarks.parcel pack "$runs" "$out"
log "packed"
if [ -f "$out/$(basename "$plan" .py).md" ] && ! grep -q 'not measured' "$out/$(basename "$plan" .py).md"; then
  log "all rows are done"
fi
exit "$status"
