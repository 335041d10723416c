#!/usr/bin/env bash
# Everything that wants one accelerator, in one go: the tests of `pytest -m gpu`, then fp16 and bf16 searches at
# BERT-base's shapes. Figures and logs go to $OUT (default: results/gpu).
#
#   benchmarks/gpu.sh [options of benchmarks/gpu.py, as --model FOLDER --data FOLDER --head_steps 500]
#
# On a machine that reaches no registry, put the missing wheels into .whl/ first; they are installed beside the system's
# own torch.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-results/gpu}
mkdir -p "$out"
if compgen -G ".whl/*.whl" > /dev/null; then
  python3 -m pip install -q --no-index --no-deps --target site .whl/*.whl
  export PYTHONPATH="$PWD/site:$PWD:${PYTHONPATH:-}"
else
  export PYTHONPATH="$PWD:${PYTHONPATH:-}"
fi
python3 -c 'import torch; assert torch.cuda.is_available(), "no accelerator"; print(torch.__version__, torch.cuda.get_device_name())'
python3 -m pytest -m gpu tests/test_gpu.py 2>&1 | tee "$out/pytest.log"
python3 benchmarks/gpu.py --out "$out/gpu.json" "$@" 2>&1 | tee "$out/gpu.log"
