#!/usr/bin/env bash
# Make the environment in which benchmarks/train.py runs Tunix, to compare its speed with jaxpost's.
#   bash launch/tunix.sh             TUNIX_VENV names another folder than .venv-tunix; PYTHON another Python 3.11
set -euo pipefail
cd "$(dirname "$0")/.."
packages=(google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2)

refuse() { echo "tunix: $*" >&2; exit 3; }

venv="${TUNIX_VENV:-.venv-tunix}"
base="${PYTHON:-python3.11}"
"$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
  refuse "needs Python 3.11: install it, or name it with PYTHON=/path/to/python3.11"
wanted="$("$base" -c 'import sys; print(sys.version)') ${packages[*]}"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/.jaxpost" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$venv"
  "$base" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" || refuse "pip could not install ${packages[*]}"
  echo "$wanted" > "$venv/.jaxpost"
fi
"$venv/bin/python" -c 'import importlib.metadata as m; print("google-tunix", m.version("google-tunix"), " jax", m.version("jax"))'
