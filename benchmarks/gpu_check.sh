#!/usr/bin/env bash
# Runs what needs a GPU and leaves its results in a folder, 10 files at most:
#   bash benchmarks/gpu_check.sh OUT [rehearsal] [tests] [kernels] [throughput] [trainer] [decode]
# The first four when none is named. rehearsal: what `make rehearse` does without a GPU, here on real tensors: every family's
# forwards and losses, and where the host waits for the device. gpu_tests.xml, gpu_check.log, kernels.json, throughput.json and one picture for each of four shapes; trainer_tests.xml
# (the trainer in bf16 and fp16, ZeRO 0-3; needs deepspeed, peft and PyAV) and decode.json (needs PyAV, and DALI for NVDEC).
# A failing step does not stop the next; the exit code is non-zero if any failed. Nothing is downloaded.
# SYNPO_FAST_NATIVE=0 leaves out building the C++ extension, which no GPU figure needs.
# KERNELS_SECONDS (default 420) stops the kernel table from starting new cases. KERNELS_ARGS are added to its arguments,
# and the later of two equal options counts: KERNELS_ARGS='--valid_rows 512 --shapes qwen2.5-7b'.
# THROUGHPUT_ARGS are added to those of throughput.py: THROUGHPUT_ARGS='--sweep ratio --plot pictures'.
set -uo pipefail

out=${1:?usage: gpu_check.sh OUT [rehearsal] [tests] [kernels] [throughput] [trainer] [decode]}
shift
steps=" ${*:-rehearsal tests kernels throughput} "
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
log="$out/gpu_check.log"
: >"$log"
failed=()

run() { # NAME COMMAND...
  local name=$1 code start=$SECONDS
  shift
  echo "== $name: $*" | tee -a "$log"
  "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  echo "== $name: exit $code after $((SECONDS - start)) s" | tee -a "$log"
  [ "$code" -eq 0 ] || failed+=("$name")
}

if [ "${SYNPO_FAST_NATIVE:-}" != 0 ] && ! compgen -G 'synpo_fast/_native*.so' >/dev/null && command -v g++ >/dev/null; then
  echo '== building the C++ extension' | tee -a "$log"
  python3 setup.py build_ext --inplace >>"$log" 2>&1 || echo 'not built: see the log' | tee -a "$log"
fi

case $steps in *' rehearsal '*)
  run rehearsal python3 -m tests.rehearsal
  run waits python3 -m pytest tests/training/test_gpu_waits.py tests/ops/test_host_copy.py -m gpu -q -p no:cacheprovider ;;
esac

case $steps in *' tests '*)
  run tests python3 -m pytest tests/ops tests/test_fused.py tests/benchmarks -q -p no:cacheprovider --junitxml="$out/gpu_tests.xml" ;;
esac

case $steps in *' kernels '*)
  # shellcheck disable=SC2086
  run kernels python3 benchmarks/kernels.py --device cuda --shapes headline --valid_rows 4096 16384 512 --valid 0.25 1 \
    --head frozen trainable --dtype bf16 --rounds 11 --budget 4 --time_limit "${KERNELS_SECONDS:-420}" \
    --json "$out/kernels.json" ${KERNELS_ARGS:-}
  if [ ! -f "$out/kernels.json" ]; then
    echo '== pictures: left out, no kernels.json' | tee -a "$log"
  elif python3 -c 'import matplotlib' 2>/dev/null; then
    run pictures python3 benchmarks/head/plot.py "$out/kernels.json" --out "$out" --kind overview
  else
    echo '== pictures: left out, no matplotlib here; draw them elsewhere from kernels.json' | tee -a "$log"
  fi ;;
esac

case $steps in *' throughput '*)
  # shellcheck disable=SC2086
  run throughput python3 benchmarks/throughput.py --device cuda --json "$out/throughput.json" ${THROUGHPUT_ARGS:-} ;;
esac

case $steps in *' trainer '*)
  run trainer python3 -m pytest tests/training/test_gpu.py tests/data/video/test_decode_dali.py -m gpu -q -p no:cacheprovider \
    --junitxml="$out/trainer_tests.xml" ;;
esac

case $steps in *' decode '*)
  run decode python3 benchmarks/decode.py --device cuda --codecs h264 hevc vp9 --json "$out/decode.json" ;;
esac

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" | tee -a "$log"
  exit 1
fi
echo 'all steps passed' | tee -a "$log"
