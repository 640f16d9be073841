#!/usr/bin/env bash
# Make an environment and run the tests:  bash launch/test.sh [--all] [pytest arguments]
#   --all  also the slow ones, and, where their environments can be made, the comparison with torch (launch/parity.sh) and
#          the step compiled for TPUs and GPUs (launch/aot.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
select=(-m "not slow and not parity")
all=
if [ "${1:-}" = --all ]; then all=1; shift; select=(-m "not parity"); fi
environment dev
"$python" -m pytest "${select[@]}" "$@"
[ -n "$all" ] || exit 0
bash launch/parity.sh --check || echo "parity: not run (see above)"
bash launch/aot.sh || [ $? = 3 ]  # 3: it said why it cannot
