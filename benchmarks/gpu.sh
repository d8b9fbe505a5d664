#!/bin/bash
# benchmarks/gpu.sh FOLDER [--toy]: on a machine with a GPU, checks the package there, measures it, leaves FOLDER/gpu.json.
# Packages that the machine lacks are taken from the wheels in ./wheels, if there is such a folder.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
if [ -d wheels ]; then
  python3 -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl
fi
python3 -c 'import cpsc_jax.configs' 2>/dev/null || python3 -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
PYTHONPATH=. python3 -m benchmarks.gpu --out "$out/gpu.json" "$@" 2>&1 | tee "$out/gpu.log"
