# Sourced by gpu.sh and gpu_campaign.sh in the repository's root: installs what this machine lacks, without a network.
if [ -d wheels ]; then
  python3 -m pip install --quiet --no-index --find-links wheels --no-deps wheels/*.whl
fi
if ! python3 -c 'import cpsc_jax.configs' 2>/dev/null; then
  python3 -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
fi
