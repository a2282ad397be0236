# Sourced by scripts/demo, scripts/test and .ci/run: virtual environments, MariaDB's servers and PgBouncer, made or installed when
# missing.

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

# MariaDB's servers: those that are there, or else Debian's. The packages are the programs alone: mariadb-server would also make
# a database of the system's, and start its server.
mariadb() {
    if mariadb_is_there; then
        return
    fi
    install mariadb-server-core mariadb-client-core
    if ! mariadb_is_there; then
        echo "MariaDB's server is missing (mariadbd, mariadb-install-db); on Debian and Ubuntu: apt-get install mariadb-server" >&2
        return 1
    fi
}

# in_container SCRIPT ARGUMENT...: run a script on a copy of this checkout in a container, which may install all it needs, and exit
# with its status. Returns only where no Docker engine answers.
in_container() {
    docker info &>/dev/null || return
    echo "a Docker engine answers: $1 goes on in a container ..." >&2
    tar -c --exclude='./.venv*' --exclude=./.git . | docker run --rm --interactive --init python:3.11 bash -c '
        mkdir /aurora_router && cd /aurora_router && tar -x --no-same-owner && exec bash "$@" </dev/null' - "$@"
    exit
}

mariadb_is_there() {
    local PATH="$PATH:/usr/sbin:/usr/bin:/usr/libexec:/usr/local/sbin:/usr/local/bin"
    command -v mariadbd >/dev/null && { command -v mariadb-install-db || command -v mysql_install_db; } >/dev/null
}

# PgBouncer: the one that is there, or else Debian's. Tests that want it say so where it cannot be had.
pooler() {
    pooler_is_there || install pgbouncer
    pooler_is_there || echo "pgbouncer is missing; on Debian and Ubuntu: apt-get install pgbouncer" >&2
}

pooler_is_there() {
    local PATH="$PATH:/usr/sbin:/usr/local/sbin"
    type -P pgbouncer >/dev/null
}

# install PACKAGE...: Debian's, where this is root; says what went wrong, and goes on.
install() {
    local log
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        log=$(mktemp)
        echo "installing $* ..." >&2
        { install_packages "$@" || { apt-get update && install_packages "$@"; }; } &>"$log" || tail -n 5 "$log" >&2
        rm -f "$log"
    fi
}

install_packages() {
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@" </dev/null
}
