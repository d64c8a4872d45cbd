#!/usr/bin/env bash
# What docs/reliability.md shows on real GPUs: deadlines' cost, kills, soak, compute-sanitizer. Needs no Rust:
# BIN is a folder with the programs and kernels that `benches/reliability.sh pack BIN` has put there on another machine.
#
#   benches/reliability.sh pack BIN            # here, with Rust
#   benches/reliability.sh run BIN OUT [STEP...]  # there; steps: cost checked kills soak sanitizer, all unless named
#
# Invariant: every step has a time limit and leaves its log in OUT, whatever became of the others.
set -uo pipefail

pack() {
    local bin=$1 name program
    mkdir -p "$bin"
    cargo build --release --locked -p peerlane --bin peerlane || exit
    cargo run --quiet --locked -p peerlane-builder -- build --out "$bin" || exit
    cargo run --quiet --locked -p peerlane-builder -- build --unbounded --out "$bin" || exit
    install -s "${CARGO_TARGET_DIR:-target}/release/peerlane" "$bin/peerlane"
    for name in kills soak conformance_cuda; do
        program=$(cargo test --locked -p peerlane-tests --test "$name" --no-run --message-format json 2>/dev/null |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
        install -s "$program" "$bin/$name" || exit
    done
}

# Rounds in turns: a machine's clocks and its other users change within seconds.
cost() {
    local round variant
    for round in 1 2 3 4 5 6 7 8; do
        for variant in "" _unbounded; do
            PEERLANE_PTX="$bin/kernels_sm_90$variant.ptx" timeout 60 "$bin/peerlane" bench all-reduce --devices cuda \
                --min 8K --max 64M --factor 8192 --json "$out/cost${variant}_$round.json"
        done
    done
}

checked() {
    local yes
    for yes in 0 1; do
        PEERLANE_CHECKED=$yes timeout 90 "$bin/peerlane" bench all-reduce --devices cuda --min 2K --max 64M --factor 8 \
            --json "$out/checked_$yes.json"
    done
}

kills() {
    PEERLANE_SIM_KILLS=1 PEERLANE_KILLS=${PEERLANE_KILLS:-200} PEERLANE_WRITE_KILLS=$out/kills.json timeout 400 "$bin/kills"
}

soak() {
    PEERLANE_SIM_SOAK_CALLS=64 PEERLANE_SOAK_CALLS=${PEERLANE_SOAK_CALLS:-5000000} timeout 580 "$bin/soak"
}

# All tests, each tool within seconds, but for racecheck: some tests take it minutes.
sanitizer() {
    local tool failed=0 tests
    for tool in memcheck initcheck synccheck racecheck; do
        tests=""
        [ $tool != racecheck ] || tests="gathers_join_any replayed_graphs reductions_ payload_that_looks_free_is every_rank_can_be"
        # shellcheck disable=SC2086
        timeout 240 "${COMPUTE_SANITIZER:-compute-sanitizer}" --tool $tool --error-exitcode 9 "$bin/conformance_cuda" $tests || failed=1
        echo "$tool: failed so far: $failed"
    done
    return $failed
}

case ${1:-} in
pack) pack "$2" ;;
run)
    bin=$2 out=$3
    mkdir -p "$out"
    export PEERLANE_SELF_TEST=off
    shift 3
    [ $# -gt 0 ] || set -- cost checked kills soak sanitizer
    for step; do
        "$step" >"$out/$step.txt" 2>&1
        echo "$step: exit status $?, $SECONDS s; $(tail -n 1 "$out/$step.txt")"
    done
    ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
