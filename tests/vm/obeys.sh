#!/usr/bin/env bash
# Does what it is told over the second serial port (for tests/vhost_user/machine.py, which starts QEMU itself).
# vm-modules: virtio_blk
# vm-seconds: 3000
. /tests/functions.sh
trap - ERR
set +e
modprobe virtio_blk
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
# Whoever listens may have come late.
echo "<ready>" >&3
while read -r -u 3 line; do
    eval "$line" >/tmp/output 2>&1 </dev/null
    status=$?
    # As text that no serial line changes.
    printf '<%s %s>\n' "$status" "$(head -c 20000 /tmp/output | base64 | tr -d '\n')" >&3
done
