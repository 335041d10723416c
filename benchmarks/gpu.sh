#!/usr/bin/env bash
# Everything that wants one accelerator, in one go: the tests of `pytest -m gpu`, steps of all methods at BERT-base's
# shapes, selection alone, then searches in fp32, bf16 and fp16. Figures and logs go to $OUT (default: results/gpu).
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
tests=0
python3 -m pytest -m gpu tests 2>&1 | tee "$out/pytest.log" || tests=$? # Figures come all the same.
python3 benchmarks/speed.py --groups gpu --out "$out/speed.json" 2>&1 | tee "$out/speed.log"
python3 benchmarks/selection.py --out "$out/selection.json" 2>&1 | tee "$out/selection.log"
python3 benchmarks/gpu.py --out "$out/gpu.json" "$@" 2>&1 | tee "$out/gpu.log"
exit "$tests"
