#!/bin/sh
# Everything that a GPU can check, in one call: facts of kernels and engine, the kernels' own tests, and where lceval and
# lm-eval are installed also the benches and lm_eval end to end.
#     sh tests/gpu/everything.sh OUT [MODEL]
# From any folder, with python3 or $PYTHON. MODEL (default smollm2-135m) should have 16-bit weights and a context of 32k
# tokens for figures worth keeping; $LIMIT is the time of the facts in seconds, $TOKENS the context of bench decode.
# A failed step does not stop the next; what failed and what was left out stands at the end. Exit 1 if a step failed.
set -u
out=${1:?say where the results go: sh tests/gpu/everything.sh OUT [MODEL]}
model=${2:-smollm2-135m}
tokens=${TOKENS:-6000}
limit=${LIMIT:-330}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.." || exit 1
# The package need not be installed: the root of the checkout has it under its own name.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed='' left_out=''

has() {  # whether all of these modules can be imported
  "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(None in map(find_spec, sys.argv[1:]))' "$@"
}

step() {  # NAME COMMAND...
  name=$1
  shift
  echo "== $name"
  "$@" || failed="$failed
  $name (status $?)"
}

without() {  # NAME WHY
  left_out="$left_out
  $1: $2"
}

gpu_tests() {
  # The versions here may warn of what those of the lock file do not, and plugins may be missing.
  set -- -m gpu -q -W default -o addopts=-ra --junitxml "$out/gpu-tests.xml" "$@"
  if has xdist; then
    cores=$(getconf _NPROCESSORS_ONLN)
    set -- -n "$((cores < 12 ? cores : 12))" "$@"
  fi
  "$python" -m pytest "$@"
}

aot() {
  lceval bench aot --json > "$out/aot.json"
}

kernels() {
  lceval bench kernels --plot "$out/kernels.html" --json > "$out/kernels.json"
}

decode() {
  lceval bench decode --pretrained "$model" --kv snapkv:0.1 --kv adakv:0.25 --kv int4 --kv snapkv:0.25+int4 --kv fier:0.1 --tokens "$tokens" --json > "$out/decode.json"
}

evaluate() {
  lm_eval --model lcft --model_args "pretrained=$model,kv=$1,attn=triton,dtype=bfloat16" --tasks lc_filings_ao_1k --apply_chat_template --limit 16 --device "$device" --log_samples --output_path "$out/eval-$1"
}

table() {
  lceval table "$out"/eval-* --format markdown > "$out/table.md" && cat "$out/table.md"
}

step 'facts' "$python" tests/gpu/probe.py --out "$out" --limit "$limit" --device "$device"
if ! has pytest hypothesis; then
  without 'gpu tests' 'they need pytest and hypothesis'
elif has lm_eval; then
  step 'gpu tests' gpu_tests tests
else
  step 'gpu tests of the kernels' gpu_tests tests/unit/test_kernels_*.py
  without 'gpu tests of the benches' 'they need lm-eval'
fi
if ! has lm_eval || ! command -v lceval > /dev/null || ! command -v lm_eval > /dev/null; then
  without 'bench aot, bench kernels, bench decode, lm_eval, table' 'they need lceval and lm-eval installed'
else
  step 'bench aot' aot
  step 'bench kernels' kernels
  step 'bench decode' decode
  for kv in full snapkv:0.25+int4 adakv:0.25 fier:0.1; do
    step "lm_eval $kv" evaluate "$kv"
  done
  step 'table' table
fi
[ -z "$left_out" ] || echo "left out:$left_out"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
echo "all steps passed"
