#!/usr/bin/env bash
# Every test there is: installs what they need (Debian and Ubuntu), then formatting, lints, unit and documentation
# tests, the bare-metal guest, and the Linux guests and scenarios, which run in the lab where this host has no hardware
# KVM. The last line is "N passed, N failed, N skipped", and how many passed at their second try in the lab, if any did;
# the exit code is 0 if nothing failed.
# Usage: tests/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
mkdir -p "$target"
log=$target/tests.log
: >"$log"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

failed_steps=()
# Runs a command with a time limit, shows it and its time, and remembers when it failed.
step() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "==> $name"
    if timeout --foreground --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"; then
        echo "    $name: ok, $((SECONDS - began)) s"
    else
        echo "    $name: FAILED, $((SECONDS - began)) s"
        failed_steps+=("$name")
    fi
}

tests/packages

# What the Linux guests boot, made while the compiler runs. Without it their tests say what is missing.
make_guests() {
    resources/rootfs/build || echo 'the stock Linux guest cannot be built'
    resources/rootfs/tools || echo 'fio for the stock Linux guest cannot be built'
    resources/image/build || echo 'the Debian image cannot be built'
}
make_guests >"$target/guests.log" 2>&1 &
guests=$!

step formatting 60 cargo fmt --all --check
step lints 600 cargo clippy --quiet --workspace --all-targets -- -D warnings
step "lints of the bare-metal guest" 300 cargo clippy --quiet --package guest --all-targets --features bare-metal -- -D warnings
mapfile -t scripts < <(git ls-files | while read -r file; do
    if [[ -f $file ]] && head -n1 "$file" | grep -qE '^#!.*\b(ba)?sh\b'; then echo "$file"; fi
done)
if command -v shellcheck >/dev/null; then
    step shellcheck 60 shellcheck "${scripts[@]}"
else
    echo 'SKIPPED 1 tests of scripts: shellcheck is not installed' | tee -a "$log"
fi

step build 600 cargo build --quiet --workspace
step "build of the tests" 600 cargo test --quiet --workspace --no-run
began=$SECONDS
wait "$guests"
cat "$target/guests.log"
echo "    guests: waited for, $((SECONDS - began)) s"

rm -rf "$target/lab/logs"
step tests 3600 cargo test --workspace --no-fail-fast
step scenarios 1800 tests/scenarios/run

# cargo's own summaries; lines of tests that found nothing to run on, which cargo counts as passed; whole programs that
# the runner skipped, which it does not.
sum() {
    awk -v word="$1;" '/^test result:/ { for (i = 2; i <= NF; i++) if ($i == word) n += $(i - 1) }
        END { print n + 0 }' "$log"
}
# The same of the scenarios, from their JUnit file. Those that the host could not run are failures here; those that an
# interrupted run left out are told by each suite only.
results=$target/lab/logs/scenarios.xml
junit() { sed -n "s/^<testsuites .*\b$1=\"\([0-9]*\)\".*/\1/p" "$results" 2>/dev/null | grep . || echo 0; }
scenarios=$(junit tests)
bad_scenarios=$(($(junit failures) + $(junit errors)))
left_out=$(sed -n 's/^ *<testsuite .* skipped="\([0-9]*\)".*/\1/p' "$results" 2>/dev/null |
    awk '{ n += $1 } END { print n + 0 }' || true)
skips=$(tests/skip/lines "$log")
gave_up=$(grep -c '^SKIPPED [a-z_]*::' <<<"$skips" || true)
not_run=$(awk '/^SKIPPED [0-9]+ tests of/ { n += $2 } END { print n + 0 }' <<<"$skips")
# What the runner ran twice counts once.
twice=$(awk '/^RERUN [0-9]+ tests of/ { n += $2 } END { print n + 0 }' "$log")
flaky=$(grep -c '^FLAKY ' "$log" || true)
passed=$(($(sum passed) - gave_up + scenarios - bad_scenarios - left_out))
failed=$(($(sum failed) - twice + bad_scenarios))
skipped=$(($(sum ignored) + gave_up + not_run + left_out))

echo
if [[ $scenarios -gt 0 ]]; then tests/scenarios/summary "$results" || failed_steps+=("summary of the scenarios"); fi
if [[ -n $skips ]]; then echo "$skips"; fi
grep '^FLAKY ' "$log" || true
grep -E '^test .* \.\.\. FAILED$|^.* --- FAILED$' "$log" || true
if [[ ${#failed_steps[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed_steps[@]}"
    # A step that failed without a failed test, such as one that does not compile, counts as one.
    if [[ $failed -eq 0 ]]; then failed=${#failed_steps[@]}; fi
    if [[ -d $target/lab/logs ]]; then echo "consoles of failed guests: $target/lab/logs"; fi
fi
second=$(if [[ $flaky -gt 0 ]]; then echo ", $flaky passed at the second try"; fi)
echo "$passed passed, $failed failed, $skipped skipped$second"
[[ $failed -eq 0 ]]
