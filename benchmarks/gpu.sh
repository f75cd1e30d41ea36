#!/usr/bin/env bash
# Measure decoding, annotation and training on one GPU in about ten minutes, and print the tables.
#
#   bash benchmarks/gpu.sh OUT                  # figures as JSON in the folder OUT, tables in OUT/tables.md
#   WHEELS=wheels bash benchmarks/gpu.sh OUT    # first install the wheels of a folder, without network
#   MODELS=tiny PARTS=decoding bash benchmarks/gpu.sh OUT    # tiny models on a CPU, to check that the script runs
set -euo pipefail

out=$(mkdir -p "${1:?the folder for the figures}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
models=${MODELS:-8b}
decoding=(--models "$models")
others=()
if [ "$models" = tiny ]; then
    decoding+=(--device cpu --repetitions 2 --num_prompt 8 --num_new 4 --batch_sizes 1)
    others+=(--quick)
fi
export HF_HUB_OFFLINE=1 PYTHONPATH="$out/packages:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/packages" "$WHEELS"/*.whl
fi

# Each part has a time limit in seconds, so a slow part does not prevent the others
measure() {
    local part=$1 seconds=$2
    shift 2
    [[ " ${PARTS:-decoding annotation training} " == *" $part "* ]] || return 0
    printf '\n## %s\n\n' "$part"
    timeout "$seconds" "$python" "$@" --output "$out/$part.json" || echo "Not measured: exit status $?."
}
{
    ! command -v nvidia-smi > /dev/null || nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    measure decoding 300 benchmarks/compiled.py "${decoding[@]}"
    measure annotation 150 benchmarks/annotation.py "${others[@]}"
    measure training 150 benchmarks/training.py "${others[@]}"
} | tee "$out/tables.md"
