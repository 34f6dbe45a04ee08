#!/bin/sh
# The gate on compiled kernels under another release of triton, installed beside this environment's.
#
#     sh tests/gpu/aot_under.sh 3.6.0
set -e
version=${1:-3.6.0}
folder=${TMPDIR:-/tmp}/lceval-triton-$version
python=${PYTHON:-python}
[ -d "$folder/triton" ] || "$python" -m pip install --quiet --no-deps --target "$folder" "triton==$version"
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH=$folder:$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m lceval.kernels.aot
