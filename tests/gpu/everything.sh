#!/bin/sh
# Everything that needs a GPU, in one call: the gpu tests, the kernels' figures and plot, decoding, and lm_eval end to end.
#     sh tests/gpu/everything.sh OUT [MODEL]
# MODEL (default smollm2-135m) should have 16-bit weights and a context of 32k tokens for figures worth keeping.
set -eu
out=${1:?say where the results go: sh tests/gpu/everything.sh OUT [MODEL]}
model=${2:-smollm2-135m}
tokens=${TOKENS:-6000}
mkdir -p "$out"
python -m pytest -m gpu -q --junitxml "$out/gpu-tests.xml"
lceval bench aot --json > "$out/aot.json"
lceval bench kernels --plot "$out/kernels.html" --json > "$out/kernels.json"
lceval bench decode --pretrained "$model" --kv snapkv:0.1 --kv adakv:0.25 --kv int4 --kv snapkv:0.25+int4 --kv fier:0.1 --tokens "$tokens" --json > "$out/decode.json"
for kv in full snapkv:0.25+int4 adakv:0.25 fier:0.1; do
  lm_eval --model lcft --model_args "pretrained=$model,kv=$kv,attn=triton,dtype=bfloat16" --tasks lc_filings_ao_1k --apply_chat_template --limit 16 --device cuda --log_samples --output_path "$out/eval-$kv"
done
lceval table "$out"/eval-* --format markdown | tee "$out/table.md"
