# What test scripts in the virtual machine lean on:  . /tests/functions.sh
# A command that fails ends the test; `fail` ends it with a reason.
set -euo pipefail
trap 'echo "FAILED at ${BASH_SOURCE[0]##*/} line $LINENO: $BASH_COMMAND" >&2' ERR

fail() { echo "FAILED: $*" >&2; exit 1; }

# Polls until the command succeeds; ends the test after so many seconds.
eventually() { # SECONDS COMMAND...
    local limit=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -le $limit ] || fail "not in time: $*"
        sleep 0.05
    done
}

# The command must fail, and say so in words that match the pattern.
refuses() { # PATTERN COMMAND...
    local pattern=$1 output
    shift
    if output=$("$@" 2>&1); then fail "this should not succeed: $*"; fi
    grep -Eq -- "$pattern" <<<"$output" || fail "'$*' failed, but not with '$pattern': $output"
}

# One command over the QMP monitor at the socket: prints what it returns; an error is printed and is a failure.
qmp() { # SOCKET COMMAND [ARGUMENTS AS JSON]
    local line reply= in out socat
    coproc SOCAT { exec timeout 60 socat - "UNIX-CONNECT:$1"; }
    # They are gone when it is.
    in=${SOCAT[0]} out=${SOCAT[1]} socat=$SOCAT_PID
    echo '{"execute":"qmp_capabilities"}' >&"$out"
    echo "{\"execute\":\"$2\",\"arguments\":${3:-{\}},\"id\":\"vm-command\"}" >&"$out"
    while read -r line <&"$in"; do
        case $line in *'"vm-command"'*) reply=$line; break ;; esac
    done
    exec {out}>&-
    wait "$socat" 2>/dev/null || true
    [ -n "$reply" ] || { echo "no answer to $2" >&2; return 1; }
    if jq -e .error <<<"$reply" >/dev/null; then
        jq -r '.error.desc' <<<"$reply" >&2
        return 1
    fi
    jq -c .return <<<"$reply"
}

# Starts a daemon (stord or qemu-storage-daemon) with a monitor at ./PROGRAM-N.qmp, and waits until it is usable.
# Sets daemon_pid and monitor.
daemons=0
daemon() { # PROGRAM ARGUMENTS...
    daemons=$((daemons + 1))
    monitor=$PWD/$1-$daemons.qmp
    local pid_file=$PWD/$1-$daemons.pid
    "$@" --chardev "socket,id=vm-monitor,path=$monitor,server=on,wait=off" --monitor vm-monitor --pidfile "$pid_file" &
    daemon_pid=$!
    local limit=$((SECONDS + 60))
    until [ -s "$pid_file" ]; do
        kill -0 $daemon_pid 2>/dev/null || fail "$1 did not start"
        [ $SECONDS -le $limit ] || fail "$1 is not usable after a minute"
        sleep 0.05
    done
}

# Ends a daemon and asserts that it ends well.
stop() { # PID
    kill "$1"
    wait "$1" || fail "the daemon ended with status $?"
}
