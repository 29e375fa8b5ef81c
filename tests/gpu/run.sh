#!/usr/bin/env bash
# bash tests/gpu/run.sh WHEELS RESULTS [bench|mixtures|tests|all]: the GPU tests and benchmarks on a machine with torch, transformers and pytest
# but without a network. WHEELS comes from tests/gpu/wheels.py; reports are written to the folder RESULTS. See README.md beside this file.
set -uo pipefail
wheels=$1 results=$2 what=${3:-all}
cd "$(dirname "$0")/../.."
mkdir -p "$results"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
export PYTHONPATH="$site:$PWD/platform:$PWD/client:$PWD/coordinator"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
[ -d shared/models ] && export FEDPEFT_SHARED="$PWD/shared"
status=0
{
  python3 -c 'import torch, transformers, peft, bitsandbytes as b; print("torch", torch.__version__, "cuda", torch.version.cuda, "transformers", transformers.__version__, "peft", peft.__version__, "bitsandbytes", b.__version__, torch.cuda.get_device_name())'
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} 2>&1 | tee "$results/machine.txt"
wanted() { [ "$what" = all ] || [ "$what" = "$1" ]; }
# Every part writes what it has as it goes, so that one which its bound ends has lost nothing; what was measured least comes first.
if wanted mixtures; then
  seconds=${MIXTURE_SECONDS:-170}  # of rows; importing and the case that is running when they end come on top
  timeout "$((seconds + 45))" python3 -W ignore -m tests.gpu.mixtures --seconds "$seconds" --json "$results/mixtures.json" 2>&1 | tee "$results/mixtures.txt" || status=1
fi
if wanted tests; then
  timeout -s INT -k 15 "${TEST_SECONDS:-120}" python3 -m pytest -v -m gpu -W ignore -p no:cacheprovider -o timeout=90 --durations=8 tests/gpu 2>&1 | tee "$results/tests.txt" || status=1
fi
if wanted bench; then
  timeout "${BENCH_SECONDS:-150}" python3 -W ignore -m tests.bench.k_memory --json "$results/k_memory.json" 2>&1 | tee "$results/k_memory.txt" || status=1
fi
echo "# status $status after $SECONDS s"
exit $status
