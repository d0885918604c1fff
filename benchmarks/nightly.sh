#!/bin/sh
# The slow tests, then the whole backbone matrix. Fails if a test does, or if a tier-1 model
# that passed in the newest committed results does not pass now.
#
#     JOBS=2 PYTHON=.venv/bin/python benchmarks/nightly.sh
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
status=0

# The matrix has a run of its own below, with its results kept.
"$python" -m pytest -m slow --ignore=tests/benchmarks/test_matrix.py || status=1

committed=$(git ls-files 'benchmarks/results/backbones-*.jsonl' | sort | tail -n 1)
if [ -z "$committed" ]; then
    echo "no committed results of the matrix to compare with" >&2
fi
# Into a file of its own: committed results stay as they are.
output=build/backbones-nightly.jsonl
rm -f "$output"
"$python" benchmarks/bench_backbones.py --jobs "${JOBS:-1}" --output "$output" \
    ${committed:+--baseline "$committed"} || status=1

exit "$status"
