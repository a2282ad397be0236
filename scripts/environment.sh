# Sourced by scripts/demo, scripts/test and .ci/run: virtual environments, made when they are missing.

export PIP_DISABLE_PIP_VERSION_CHECK=1

# environment DIRECTORY REQUIREMENT...: a virtual environment that has these. Quick when that was seen to before and
# pyproject.toml is as it was.
environment() {
    local directory=$1 python stamp state
    shift
    stamp="$directory/installed-$(cksum <<<"$*" | tr -d ' ')"
    state="$(cksum <pyproject.toml) $PWD"
    if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then
        return
    fi
    if ! "$directory/bin/python" -m pip --version &>/dev/null; then
        python=$(find_python) || return
        echo "making the virtual environment $directory ..." >&2
        "$python" -m venv --clear "$directory" || return
    fi
    echo "installing $* in $directory; the first time this takes about a minute ..." >&2
    if ! "$directory/bin/python" -m pip install --quiet --upgrade "${@/#./-e.}" &>"$directory/pip.log"; then
        grep -v '^WARNING' "$directory/pip.log" >&2
        echo "installing failed, see above; it needs a network, or a package index that pip is configured for" >&2
        return 1
    fi
    echo "$state" >"$stamp"
}

# The name of a Python that will do: $PYTHON, or else the first that is new enough.
find_python() {
    local python
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' &>/dev/null; then
            if ! "$python" -c 'import ensurepip, venv' &>/dev/null; then
                echo "$python cannot make virtual environments; on Debian and Ubuntu: apt install" \
                    "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2
                return 1
            fi
            echo "$python"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}
