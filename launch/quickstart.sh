#!/usr/bin/env bash
# Make an environment and fine-tune a real 135M model on this machine's CPU or accelerator, in a few minutes.
#   bash launch/quickstart.sh [key=value ...]      overrides go to configs/quickstart.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment report
run=runs/quickstart
[ -f data/orders/train.jsonl ] || "$python" -m jaxpost.evals.orders --out data/orders
"$python" -m jaxpost.train --config=configs/quickstart.yaml "$@"
[ -d "$run/export/hf" ] || "$python" -m jaxpost.export "$run" --to hf
cat <<TXT

What to try next
  chat with it         $python -m jaxpost.generate $run
  see the training rows  $python -m jaxpost.data configs/quickstart.yaml
  open it elsewhere    transformers.AutoModelForCausalLM.from_pretrained("$run/export/hf")
  your own rows        $python -m jaxpost.train --config=configs/quickstart.yaml run_dir=runs/mine data.path=my.jsonl eval.metric=null
TXT
