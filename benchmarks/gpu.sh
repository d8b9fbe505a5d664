#!/bin/bash
# benchmarks/gpu.sh FOLDER [--toy]: on a machine with a GPU, checks the package there, measures it, leaves FOLDER/gpu.json.
# Packages that the machine lacks are taken from the wheels in ./wheels, if there is such a folder.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
. benchmarks/packages.sh
PYTHONPATH=. python3 -m benchmarks.gpu --out "$out/gpu.json" "$@" 2>&1 | tee "$out/gpu.log"
