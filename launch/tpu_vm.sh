#!/usr/bin/env bash
# Train on a Cloud TPU VM or on all hosts of a slice; the same command again goes on with the run.
#   TPU_NAME=post TPU_ZONE=us-east5-b TPU_TYPE=v5litepod-8 bash launch/tpu_vm.sh --config=FILE [key=value ...]
# TPU_NAME, TPU_ZONE  the machine; made if it is not there (TPU_TYPE), made again if it was preempted
# TPU_VERSION         its software (default v2-alpha-tpuv5-lite);   TPU_CREATE_FLAGS  more for its creation, e.g. --spot
# COMMIT              what is copied there (default HEAD);           DRY_RUN=1  print the commands and run none
# See docs/launch.md.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in TPU_NAME TPU_ZONE TPU_TYPE; do
  [ -n "${!name:-}" ] || { echo "$name is not set: see the top of launch/tpu_vm.sh" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "usage: bash launch/tpu_vm.sh --config=FILE [key=value ...]" >&2; exit 2; }
commit="$(git rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}")" || { echo "COMMIT=${COMMIT:-HEAD}: no such commit" >&2; exit 2; }
read -ra create_flags <<< "${TPU_CREATE_FLAGS:-}"
where=("$TPU_NAME" "--zone=$TPU_ZONE")

run() {  # a command, printed as it could be typed
  printf '+'; printf ' %q' "$@"; echo
  [ -n "${DRY_RUN:-}" ] || "$@"
}
tpu() { run gcloud compute tpus tpu-vm "$@"; }
on_all() { tpu ssh "${where[@]}" --worker=all --command="$1"; }
create() { tpu create "${where[@]}" "--accelerator-type=$TPU_TYPE" "--version=${TPU_VERSION:-v2-alpha-tpuv5-lite}" "${create_flags[@]}"; }

state=
if [ -z "${DRY_RUN:-}" ]; then
  state="$(gcloud compute tpus tpu-vm describe "${where[@]}" --format='value(state)' 2>/dev/null || true)"
fi
case "$state" in
  READY) echo "== $TPU_NAME is there" ;;
  "") create ;;
  PREEMPTED | TERMINATED) tpu delete "${where[@]}" --quiet; create ;;
  *) echo "$TPU_NAME is $state: wait, or delete it" >&2; exit 1 ;;
esac

folder="jaxpost-${commit:0:12}"
bundle="$(mktemp -d)/$folder.tar.gz"
trap 'rm -rf "${bundle%/*}"' EXIT
[ -z "$(git status --porcelain -uno)" ] || echo "== changes that are not committed are not copied"
run git archive --format=tar.gz "--prefix=$folder/" "--output=$bundle" "$commit"
tpu scp "$bundle" "$TPU_NAME:" "--zone=$TPU_ZONE" --worker=all
on_all "tar xzf $folder.tar.gz && { command -v python3.11 >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv; }; }"
on_all "cd $folder && set -euo pipefail && . launch/environment.sh && JAXPOST_VENV=\$HOME/.jaxpost-venv JAXPOST_EXTRAS=tpu environment report"
printf -v words ' %q' mesh.distributed=true "$@"
on_all "cd $folder &&${JAXPOST_DATA:+ JAXPOST_DATA=$(printf %q "$JAXPOST_DATA")} \$HOME/.jaxpost-venv/bin/python -m jaxpost.train$words"
