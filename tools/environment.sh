# Sourced by tools/demo, tools/test and .ci/run: the virtual environment of this checkout.
# Works with the bash 3.2 of macOS.

# Make .venv if it is missing and install vlmopt into it, editable, unless pyproject.toml is the
# same as at the last time. The working directory is the root of the checkout.
#   $1: run, test or dev; each includes the one before
#   $PYTHON: the interpreter to make .venv with
ensure_environment() {
    local extra=$1 python=.venv/bin/python base target level
    if [ ! -x "$python" ]; then
        base=$(find_python)
        "$base" -m venv .venv
    fi
    if cmp -s pyproject.toml ".venv/installed-$extra.toml"; then
        return
    fi
    target=.
    [ "$extra" = run ] || target=".[$extra]"
    echo "installing vlmopt into .venv (once, and after changes of pyproject.toml)" >&2
    # one call, so that one resolution decides on the version of torch
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$target"
    for level in run test dev; do
        cp pyproject.toml ".venv/installed-$level.toml"
        [ "$level" != "$extra" ] || break
    done
}

# Print the interpreter to use: $PYTHON, or the first one of 3.11 or newer.
find_python() {
    local candidate
    set -- python3.11 python3
    [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
    for candidate; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "vlmopt needs Python 3.11 or newer, which ${PYTHON:-python3.11 or python3} is not." >&2
    echo "Set PYTHON to the interpreter to use, such as PYTHON=/usr/bin/python3.12." >&2
    return 1
}
