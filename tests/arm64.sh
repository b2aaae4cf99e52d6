#!/bin/bash
# Runs iotd's tests in an emulated arm64 Debian 12 that shows the processor features of a Raspberry Pi 5.
#
#   sudo tests/arm64.sh [WORKDIR [PYTEST ARGUMENTS...]]
#
# WORKDIR (default: ~/.cache/iotd-arm64) keeps the userland and the wheels, about 1 GB, so that later runs start soon;
# delete it to begin anew. Without pytest arguments the golden tests run and one ask through the whole daemon.
# Speeds seen here mean nothing.
#
# Needs root on an x86-64 Debian: it installs qemu-user-static, binfmt-support and debootstrap where they are missing.
# Packages and wheels come from wherever apt and pip of this machine get theirs, and are fetched outside the emulation.
# All mounts and processes live in namespaces of their own, which end with the script, whichever way it ends.
set -euo pipefail

suite=bookworm
python=3.11
debian_packages=python3-venv,mosquitto
extras=convert
test_packages=(pytest)
default_selection=(tests/test_golden.py tests/test_app.py::test_a_question_is_answered)

say() { echo "arm64: $*" >&2; }

install_tools() {
    local missing=()
    command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
    command -v update-binfmts >/dev/null || missing+=(binfmt-support)
    command -v debootstrap >/dev/null || missing+=(debootstrap debian-archive-keyring)
    python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip python3-venv)
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
}

enable_emulation() {
    [[ -e /proc/sys/fs/binfmt_misc/register ]] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    [[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]] || update-binfmts --enable qemu-aarch64
}

# Prints the mirror apt uses here; nothing leaves debootstrap its default.
apt_mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' 'Label: Debian' | sed -n 1p
}

use_apt_proxy() {
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    export ${http_proxy:+http_proxy} ${https_proxy:+https_proxy}
}

make_userland() {
    [[ ! -e $work/userland.done ]] || return 0
    say "making an arm64 Debian $suite in $root"
    rm -rf "$root"
    (
        use_apt_proxy
        mirror=$(apt_mirror)
        debootstrap --foreign --arch=arm64 --variant=minbase --include="$debian_packages" \
            "$suite" "$root" ${mirror:+"$mirror"}
    )
    # In a container debootstrap leaves a link to /proc here, which loops inside the chroot.
    [[ ! -L $root/proc ]] || rm "$root/proc"
    mkdir -p "$root"/{proc,repository,wheels}
    mount_proc
    chroot "$root" /debootstrap/debootstrap --second-stage
    printf '%s localhost\n' 127.0.0.1 ::1 >"$root/etc/hosts"
    touch "$work/userland.done"
}

mount_proc() {
    mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
}

# Without the board's Features line onnxruntime takes other, slower kernels than the board would.
mount_cpuinfo() {
    local n
    for n in 0 1 2 3; do
        printf '%s\t: %s\n' processor "$n" BogoMIPS 108.00 \
            Features "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp" \
            "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x4 "CPU part" 0xd0b "CPU revision" 1
        echo
    done >"$work/cpuinfo"
    printf '%s\t: %s\n' Model "Raspberry Pi 5 Model B Rev 1.0" >>"$work/cpuinfo"
    mount --bind "$work/cpuinfo" "$root/proc/cpuinfo"
}

mount_read_only() {
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
}

mount_all() {
    mount_proc
    mount_cpuinfo
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs tmpfs "$root/dev/shm"
    mount_read_only "$repository" "$root/repository"
    mount_read_only "$work/wheels" "$root/wheels"
}

# This machine's pip fetches for the other architecture: it knows the index, the proxy and the certificates.
fetch_wheels() {
    local glibc platforms=(--platform manylinux2014_aarch64)
    say "fetching wheels"
    mkdir -p "$work/wheels"
    rm -f "$work"/wheels/iotd-*.whl
    python3 -m pip wheel -q --no-deps --wheel-dir "$work/wheels" "$repository"
    for glibc in {17..36}; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
    python3 -m pip download -q --dest "$work/wheels" --only-binary :all: --python-version "$python" "${platforms[@]}" \
        "$(echo "$work"/wheels/iotd-*.whl)[$extras]" "${test_packages[@]}"
}

# Runs one command in the userland; nothing of this machine's environment goes in.
inside() {
    chroot "$root" /usr/bin/env -i -C /repository HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
        PATH=/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin QEMU_CPU=neoverse-n1 "$@"
}

install_project() {
    local wheel
    wheel=$(basename "$work"/wheels/iotd-*.whl)
    say "installing $wheel"
    [[ -e $root/venv/bin/pip ]] || inside python3 -m venv /venv
    inside pip install -q --no-index --find-links /wheels "/wheels/$wheel[$extras]" "${test_packages[@]}"
    inside pip install -q --no-index --no-deps --force-reinstall "/wheels/$wheel"
}

main() {
    trap 'exit 130' INT TERM
    mkdir -p "$work"
    install_tools
    enable_emulation
    make_userland
    fetch_wheels
    mount_all
    install_project
    say "pytest $*"
    inside pytest -p no:cacheprovider "$@"
}

[[ $(id -u) == 0 && $(uname -m) == x86_64 ]] || { say "must run as root on x86-64"; exit 2; }
if [[ -z ${IOTD_ARM64_NAMESPACE:-} ]]; then
    IOTD_ARM64_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child --mount-proc "$BASH" "$0" "$@"
fi
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/iotd-arm64}")
root=$work/rootfs
shift $(($# > 0))
(($# > 0)) || set -- "${default_selection[@]}"
main "$@"
