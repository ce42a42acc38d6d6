#!/usr/bin/env bash
# Measures a GPU on a machine without a network.
#
#   benchmarks/gpu_device.sh pack texts.csv    where there is a network: writes .gpu/bundle.tar.xz, 52 MB, in some minutes
#   benchmarks/gpu_device.sh run [OPTION …]    where the GPU is, in a copy of the repository with that file: neither network
#                                              nor root is needed
#
# `run` passes its options on to benchmarks.gpu, and the figures are in benchmarks/results/gpu-all.{json,md}. Without a GPU it
# can be rehearsed: `PYTHON=.venv/bin/python benchmarks/gpu_device.sh run --device cpu`.
#
# In the bundle, which git ignores:
#   wheels, 20 MB     what the worker and the benchmark need beside torch, transformers and ONNX Runtime, and what these bring;
#                     from the package index, for TARGET's Python and glibc 2.34 on x86-64. `run` installs those that the GPU
#                     machine's Python lacks or has in an older version, into a folder of its own
#   java, 76 MB       the modules of this machine's Java that Kafka uses; jlink makes it
#   cache, 76 MB      Kafka's jars, from Maven Central, stored and with the native libraries of this platform alone
#   texts.csv, commit
#
# The GPU machine needs Python 3.12 (or what TARGET said) with torch for CUDA (2.10 for the unpadded pass), transformers and
# ONNX Runtime. `run` looks for it and says what it has found. They are not in the bundle, for torch with CUDA's libraries
# takes gigabytes. Where that Python lacks them, bring a second folder:
#
#   python3 -m pip download --dest torch-wheels --only-binary=:all: --implementation cp --python-version 3.12 \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 torch transformers onnxruntime
#   python3 -m pip install --no-index --find-links torch-wheels torch transformers onnxruntime
#
# `pack` needs this repository's .venv (`make test` makes it) with pip, Java's jlink, and Maven unless Kafka's jars are in the
# cache already.
set -euo pipefail
cd "$(dirname "$0")/.."
TARGET=${TARGET:-3.12}
BUNDLE=.gpu/bundle.tar.xz

# What the worker and the benchmark need beside torch, transformers and ONNX Runtime, and what these bring.
PACKAGES="aiohappyeyeballs aiohttp aiokafka aiosignal annotated-types async-timeout attrs confluent-kafka cramjam frozenlist
  multidict nanotoken orjson prometheus-client propcache pydantic pydantic-core pydantic-settings python-dotenv
  python-json-logger rich typing-extensions typing-inspection uvloop yarl"

# What Kafka's broker uses of Java.
MODULES=java.base,java.desktop,java.logging,java.management,java.naming,java.security.jgss,java.security.sasl,java.sql
MODULES=$MODULES,java.xml,jdk.management,jdk.net,jdk.unsupported,jdk.zipfs

fail() { echo "gpu_device.sh: $*" >&2; exit 2; }

pack() {
  [ -f "${1:-}" ] || fail "pack wants a CSV file with a column text"
  local python=${PYTHON:-.venv/bin/python} folder=.gpu/bundle
  rm -rf "$folder" "$BUNDLE"
  mkdir -p "$folder/wheels"
  local wanted=()
  for name in $PACKAGES; do
    wanted+=("$(sed -n "s/^\($name==[^ ]*\).*/\1/p" requirements/dev.txt)")
  done
  local platforms=()
  for glibc in 2_34 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  "$python" -m pip download --quiet --dest "$folder/wheels" --no-deps --only-binary=:all: --implementation cp \
    --python-version "$TARGET" "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "${wanted[@]}"
  jlink --add-modules "$MODULES" --strip-debug --no-header-files --no-man-pages --compress=0 --output "$folder/java"
  PYTHONPATH=. "$python" benchmarks/gpu_jars.py "$folder/cache/sentiment-worker"
  cp "$1" "$folder/texts.csv"
  git describe --always --dirty >"$folder/commit"
  tar --create --file - --directory "$folder" . | xz -7 >"$BUNDLE"
  du -sm "$folder"/*
  ls -l "$BUNDLE"
}

# The first Python that has torch and transformers, told on standard error with what it has.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 "python$TARGET" /opt/*/bin/python3 /opt/*/.venv/bin/python3 /opt/*/*/bin/python3; do
    command -v "$candidate" >/dev/null || continue
    if "$candidate" - >&2 <<'PYTHON'
import platform, sys
import onnxruntime, torch, transformers
gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
print(f"{sys.executable}: Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"transformers {transformers.__version__}, ONNX Runtime {onnxruntime.__version__}, GPUs: {', '.join(gpus) or 'none'}")
PYTHON
    then command -v "$candidate"; return
    fi
  done
  fail "no Python here has torch, transformers and onnxruntime; the head of this script says how to bring them, and PYTHON names one elsewhere"
}

run() {
  [ -f "$BUNDLE" ] || fail "there is no $BUNDLE; make it with 'pack' where there is a network"
  local python
  python=$(find_python 2> >(grep -v '^ \|^Traceback\|Error' >&2)) || exit 2
  work=$(mktemp -d "${TMPDIR:-/tmp}/gpu-bundle.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  "$python" -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='data')" "$BUNDLE" "$work"
  install_missing "$python" "$work"
  local root=$PWD
  PATH="$work/java/bin:$PATH" XDG_CACHE_HOME="$work/cache" PYTHONPATH="$root:$work/site" TEST_KAFKA=java \
    "$python" -m benchmarks.gpu "$work/texts.csv" --commit "$(cat "$work/commit")" "$@"
}

# Installs, beside that Python, the wheels of packages that it lacks or has in an older version.
install_missing() {
  local wheels
  wheels=$("$1" - "$2/wheels" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

def number(text):
    return [int(part) for part in text.split(".") if part.isdigit()]

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    name, carried = wheel.name.split("-")[:2]
    try:
        if number(version(name)) >= number(carried):
            continue
    except PackageNotFoundError:
        pass
    print(wheel)
PYTHON
)
  mkdir -p "$2/site"
  # shellcheck disable=SC2086 # a path for each word
  [ -z "$wheels" ] || "$1" -m pip install --quiet --no-index --no-deps --no-compile --target "$2/site" $wheels
}

case "${1:-}" in
  pack | run) "$@" ;;
  *) fail "say pack or run; the head of this script has more" ;;
esac
