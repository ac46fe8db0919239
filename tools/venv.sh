#!/bin/sh
# Make a virtual environment and install flatwise into it, in place:
#
#     sh tools/venv.sh DIR PYTHON EXTRAS [options for pip]
#
# Safe to interrupt. While packages are being installed, DIR holds the file `.installing`; the next run that finds it
# makes the environment afresh, because half an installation can look like a whole one. An environment that this
# script did not make is installed into, and never erased.
set -eu

dir=$1
python=$2
extras=$3
shift 3

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

is_root() { [ "$(id -u)" = 0 ]; }

# Debian and Ubuntu ship Python without `ensurepip`; it comes in a package named after the version.
need_venv() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if is_root && command -v apt-get >/dev/null; then
        echo "$python cannot make virtual environments yet: installing $package" >&2
        { apt-get update -qq && apt-get install -y -qq "$package"; } >&2 || true
        "$python" -c 'import ensurepip, venv' 2>/dev/null && return
    fi
    die "$python cannot make virtual environments: its modules 'venv' and 'ensurepip' are not both there." \
        "Debian and Ubuntu keep them in a package of their own. Install it, then run the same command again:" \
        "    sudo apt-get install $package" \
        "Or name another Python:  make ... PYTHON=/path/to/python3"
}

command -v "$python" >/dev/null ||
    die "No '$python' on this machine. Install Python 3.10 or newer, or name yours:  make ... PYTHON=python3.12"
"$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' ||
    die "flatwise needs Python 3.10 or newer; '$python' is $("$python" --version 2>&1)." \
        "Name a newer one:  make ... PYTHON=python3.12"

marker=$dir/.installing
if [ -e "$marker" ]; then
    echo "The last installation into $dir did not finish: making it afresh." >&2
    need_venv
    rm -rf "$dir"
fi
if [ ! -e "$dir/pyvenv.cfg" ]; then
    need_venv
    mkdir -p "$dir"
    : >"$dir/.made-by-flatwise"
    : >"$marker"
    "$python" -m venv "$dir"
elif [ -e "$dir/.made-by-flatwise" ]; then
    : >"$marker"
fi

"$dir/bin/python" -m pip install --disable-pip-version-check --quiet "$@" --editable ".[$extras]" ||
    die "pip could not install flatwise into $dir; its own message is above. Run the same command again to retry."
rm -f "$marker"
