#!/usr/bin/env bash
# Compile the real train step for TPU v5e and NVIDIA H100 on this machine, which needs neither, and check what comes out:
#   bash launch/aot.sh [pytest arguments]      prints the table of docs/accelerators.md, one line a compilation
# The environment is .venv-aot (about 2 GB: libtpu, the CUDA plugin without CUDA); AOT_VENV names another folder,
# AOT_ENV=DIR uses a finished environment as it is. Ends with status 3, and says why, where it cannot be made.
# Minutes: about 12 on 2 idle cores, and 4 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/.."
jax=0.10.2  # the compilers that the table was made with; another version may move things otherwise

refuse() { echo "aot: $*" >&2; exit 3; }

[ "$(uname -sm)" = "Linux x86_64" ] || refuse "libtpu and the CUDA plugin are there for Linux on x86-64 only"
if [ -n "${AOT_ENV:-}" ]; then
  python="$AOT_ENV/bin/python"
  [ -x "$python" ] || { echo "AOT_ENV=$AOT_ENV has no bin/python" >&2; exit 2; }
else
  venv="${AOT_VENV:-.venv-aot}"
  base="${PYTHON:-python3.11}"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    refuse "needs Python >= 3.11: install it, or name it with PYTHON=/path/to/python"
  python="$venv/bin/python"
  wanted="$("$base" -c 'import sys; print(sys.version)') jax==$jax $(cksum < pyproject.toml)"
  if [ ! -x "$python" ] || [ "$(cat "$venv/.jaxpost" 2>/dev/null)" != "$wanted" ]; then
    echo "== environment: $venv from $base; packages are downloaded once"
    rm -rf "$venv"
    "$base" -m venv "$venv"
    pip=("$python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "jax[tpu]==$jax" --editable '.[dev]' || refuse "pip cannot install jax[tpu]==$jax: see above"
    "${pip[@]}" --no-deps "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax" || refuse "pip finds no CUDA plugin: see above"
    echo "$wanted" > "$venv/.jaxpost"
  fi
fi

export JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE=1
for module in libtpu jax_cuda13_plugin pytest; do
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" ||
    refuse "the environment misses $module"
done
exec "$python" -m pytest tests/aot -rs -s "$@"
