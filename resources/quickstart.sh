#!/usr/bin/env bash
# From a fresh Debian or Ubuntu to the login prompt of a guest: installs what is missing, builds skiff, makes a guest
# out of the distribution's kernel and a small ext4 root file system (without root rights), and boots it here. Where
# the KVM of this host is a software one, which cannot run a stock kernel, the same happens inside the lab (tests/lab).
# Usage: resources/quickstart.sh [--check]     --check: log in, power off and be gone, for machines that try this
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/.." && pwd)

# The other side of --check, which runs where the guest does: starts the command, logs in on its console, powers off.
if [[ ${1:-} == --drive ]]; then
    shift
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    mkfifo "$folder/keys"
    : >"$folder/console"
    "$@" <"$folder/keys" >"$folder/console" &
    exec 3>"$folder/keys"
    wait_for() {
        for _ in {1..600}; do
            if grep -q "$1" "$folder/console"; then return; fi
            if ! kill -0 %1 2>/dev/null; then break; fi
            sleep 0.2
        done
        cat "$folder/console"
        echo "quickstart: the guest did not come to \"$1\"" >&2
        kill %1 2>/dev/null || true
        exit 1
    }
    wait_for 'login:'
    echo root >&3
    wait_for '# '
    echo poweroff >&3
    wait %1
    tr -d '\r' <"$folder/console"
    exit
fi

check=''
case ${1:-} in
    '') ;;
    --check) check=1 ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
if [[ $(uname -m) != x86_64 ]]; then
    echo 'quickstart: skiff runs on x86-64 only' >&2
    exit 1
fi

# Rust: a distribution's own is often too old, so rustup, which Debian 13 and Ubuntu 24.04 have as a package.
PATH=$PATH:$HOME/.cargo/bin
"$repo/tests/packages" kmod e2fsprogs lz4 zstd xz-utils gcc libc6-dev
if ! command -v cargo >/dev/null; then
    if ! "$repo/tests/packages" rustup; then
        echo 'quickstart: no Rust; install it as https://rustup.rs says, then start this again' >&2
        exit 1
    fi
    rustup default stable
fi

cd "$repo"
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
echo '==> building skiff'
cargo build --quiet --release --package skiff
echo '==> making a guest'
"$here/rootfs/build"
# The lab may write nowhere else.
mkdir -p "$target/lab"
disk=$target/lab/quickstart.img
if [[ ! -f $disk ]]; then cp --sparse=always "$target/linux/root.img" "$disk"; fi

skiff=$target/x86_64-unknown-linux-gnu/release/skiff
run=("$skiff" run --kernel "$target/linux/vmlinuz" --initrd "$target/linux/initrd.img" --disk "path=$disk"
    --cmdline 'console=ttyS0 quiet root=/dev/vda rw' --cpus 2 --memory 512M)
kind=$("$repo/tests/lab/kvm-kind" "$skiff")
place=()
if [[ $kind != hardware ]]; then
    "$repo/tests/packages"
    place=("$repo/tests/lab/run")
    if [[ -z $check ]]; then place+=(-i); fi
fi

cat <<END

kernel   $target/linux/vmlinuz ($(cat "$target/linux/release"))
initrd   $target/linux/initrd.img
disk     $disk
skiff    $skiff

END
if [[ ${#place[@]} -gt 0 ]]; then
    cat <<END
KVM here: $kind. That cannot run a stock kernel, so skiff runs inside the lab: an emulated machine with a real KVM,
about ten times slower. "skiff doctor" says:

END
    { "$skiff" doctor || true; } | grep -A1 '^problem' || true
    echo
fi
printf '$'
printf ' %q' "${run[@]}"
printf '\n\nLog in as root, without a password. "poweroff" or Ctrl-A x ends it.\n\n'

if [[ -n $check ]]; then
    "${place[@]}" "$here/quickstart.sh" --drive "${run[@]}"
    echo 'quickstart: the guest came to its login prompt and powered off'
else
    "${place[@]}" "${run[@]}"
fi
