#!/bin/sh
# kvpress 0.5.5 in a virtual environment of its own: it pins transformers below 5.3, lceval needs 5.24 or newer.
#   make_env.sh [FOLDER]        default: peers/kvpress in the cache folder; prints the environment's python
# The same torch as lceval's, so that differences are the libraries' and not the arithmetic's. Everything else is what
# kvpress itself asks for, about 1.4 GB on disk. On a machine without a GPU, point pip at PyTorch's CPU index first
# (PIP_EXTRA_INDEX_URL); otherwise torch brings CUDA.
set -eu
folder=${1:-${LCEVAL_CACHE:-$HOME/.cache/lceval}/peers/kvpress}
if ! "$folder/bin/python" -c 'from importlib.metadata import version; assert version("kvpress") == "0.5.5"' 2>/dev/null; then
    "${PYTHON:-python3}" -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.13.0 "transformers>=5.2,<5.3" kvpress==0.5.5 >&2
fi
echo "$folder/bin/python"
