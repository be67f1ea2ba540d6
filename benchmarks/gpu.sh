#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: tests of the kernels, the sanitizers where they are installed, and the benchmarks.
#
#     benchmarks/gpu.sh [FOLDER]      writes attention-, paged-, decoding- and first-use-<card>.json to FOLDER, default benchmarks/results
set -euo pipefail
cd "$(dirname "$0")/.."

card=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')
out=${1:-benchmarks/results}

python -m pytest -q -m gpu tests
if command -v compute-sanitizer > /dev/null; then
    check="compute-sanitizer --report-api-errors no --error-exitcode 9"
    $check --tool memcheck python benchmarks/sanitize.py 64 128 256
    for kernel in attend append whiten encode_scalar encode_joint exact decode_units; do
        $check --tool racecheck --kernel-name "kns=$kernel" python benchmarks/sanitize.py 64 128
    done
fi
python benchmarks/attention.py --out "$out/attention-$card.json"
python benchmarks/paged.py --out "$out/paged-$card.json"
python benchmarks/first_use.py --out "$out/first-use-$card.json"
python benchmarks/decoding.py --out "$out/decoding-$card.json"
