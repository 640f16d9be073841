#!/usr/bin/env bash
# Make an environment and run the tests:  bash launch/test.sh [--all] [pytest arguments]
#   --all  also the slow ones, and, where its environment can be made, the comparison with torch (launch/parity.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
select=(-m "not slow and not parity")
all=
if [ "${1:-}" = --all ]; then all=1; shift; select=(-m "not parity"); fi
environment dev
"$python" -m pytest "${select[@]}" "$@"
if [ -n "$all" ]; then bash launch/parity.sh --check || echo "parity: not run (see above)"; fi
