# Block devices of vduse-blk exports:  . /tests/vduse.sh  (after functions.sh)
modprobe -a vduse virtio_vdpa virtio_blk

# Puts the export's device on the virtio bus and sets `disk` to its block device, /dev/vdX.
plug() { # NAME
    vdpa dev add name "$1" mgmtdev vduse
    plugged() { [ -n "$(ls -d "/sys/bus/vdpa/devices/$1"/virtio*/block/vd* 2>/dev/null)" ]; }
    eventually 30 plugged "$1"
    disk=/dev/$(basename "/sys/bus/vdpa/devices/$1"/virtio*/block/vd*)
    eventually 30 test -b "$disk"
}

unplug() { vdpa dev del "$1"; } # NAME

# Adds an export by QMP; the options are JSON members, each with a comma before it.
export_disk() { # NODE NAME [OPTIONS]
    qmp "$monitor" block-export-add "{\"type\":\"vduse-blk\",\"id\":\"$2\",\"node-name\":\"$1\",\"name\":\"$2\"${3:-}}" >/dev/null
}

no_export() { [ "$(qmp "$monitor" query-block-exports | jq length)" = 0 ]; }

# Takes the export away, after its device.
withdraw() { # NAME
    qmp "$monitor" block-export-del "{\"id\":\"$1\"}" >/dev/null
    gone() { ! qmp "$monitor" query-block-exports | jq -e ".[] | select(.id == \"$1\")" >/dev/null; }
    eventually 30 gone "$1"
}

# The value of a queue attribute of the block device.
queue() { cat "/sys/block/${disk#/dev/}/queue/$1"; } # ATTRIBUTE
