#!/usr/bin/env bash
# Make an environment and fine-tune a real 135M model on this machine's CPU or accelerator, in a few minutes.
#   bash launch/quickstart.sh [key=value ...]      overrides go to configs/quickstart.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment report
run=runs/quickstart
for word in "$@"; do case "$word" in run_dir=*) run="${word#run_dir=}" ;; esac; done
[ -f data/orders/unseen.jsonl ] || "$python" -m jaxpost.evals.orders --out data/orders
# Large buffers in pages of 2 MiB: on a CPU a step takes a tenth less time (docs/performance.md).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
"$python" -m jaxpost.train --config=configs/quickstart.yaml "$@"
if grep -q "stopped by a signal" <(tail -n 1 "$run/logs/events.log"); then exit 130; fi
if [ ! "$run/export/hf" -nt "$run/checkpoints/LATEST" ]; then  # not yet, or the run went on since
  rm -rf "$run/export/hf"
  "$python" -m jaxpost.export "$run" --to hf
fi
cat <<TXT

What to try next (part of what the untouched model failed at was the format: see docs/results.md)
  chat with it           $python -m jaxpost.generate $run
  see the training rows  $python -m jaxpost.data configs/quickstart.yaml
  look at the loss       $run/loss.png, or with pip install tensorboard: tensorboard --logdir $run/tensorboard
  open it elsewhere      transformers.AutoModelForCausalLM.from_pretrained("$run/export/hf")
  your own rows          $python -m jaxpost.train --config=configs/quickstart.yaml run_dir=runs/mine data.path=my.jsonl data.loss_on=assistant data.eval=[] eval.tasks=[] eval.samples=0 loop.eval_first=false
TXT
