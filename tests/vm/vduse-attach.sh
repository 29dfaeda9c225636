# A disk comes and goes with its export: attach, event, resize, users, removal, and what is missing is said.
. /tests/functions.sh
qemu-img create -q -f qcow2 disk.qcow2 64M
node="--blockdev driver=file,node-name=file,filename=disk.qcow2 --blockdev driver=qcow2,node-name=disk,file=file"
export="vduse-blk,id=e,node-name=disk,name=d0,writable=on"
refuses "modprobe -a vduse virtio_vdpa" stord $node --export $export
modprobe vduse
refuses "modprobe virtio_vdpa" stord $node --export $export,attach=on
[ ! -e /dev/vduse/d0 ] || fail "a failed export leaves a device"
modprobe -a virtio_vdpa virtio_blk

# By hand, as with the reference.
daemon stord --chardev socket,id=second,path=second.qmp,server=on,wait=off --monitor second $node \
    --export $export,num-queues=4,serial=abc,logical-block-size=4096
[ "$(qmp "$monitor" query-block-exports | jq -r '.[0].device')" = null ] || fail "a device before there is one"
vdpa dev add name d0 mgmtdev vduse
[ "$(qmp "$monitor" query-block-exports | jq -r '.[0].device')" = /dev/vda ] || fail "no device"
[ "$(cat /sys/block/vda/serial) $(cat /sys/block/vda/queue/logical_block_size)" = "abc 4096" ] || fail "serial, block size"
refuses "still in use" qmp "$monitor" block-export-del '{"id":"e"}'
vdpa dev del d0
qmp "$monitor" block-export-del '{"id":"e"}'
[ ! -e /dev/vduse/d0 ] || fail "the device is left"

# By itself.
{ echo '{"execute":"qmp_capabilities"}'; sleep 600; } | socat - UNIX-CONNECT:second.qmp >events &
watch=$!
eventually 10 grep -q return events
qmp "$monitor" block-export-add '{"type":"vduse-blk","id":"e","node-name":"disk","name":"d0","writable":true,"attach":true}'
eventually 10 grep -q '"BLOCK_EXPORT_ATTACHED".*"/dev/vda"\|"/dev/vda".*"BLOCK_EXPORT_ATTACHED"' events
kill $watch
mkfs.ext4 -q /dev/vda
mkdir mounted
mount /dev/vda mounted
refuses "still in use" qmp "$monitor" block-export-del '{"id":"e"}'
qmp "$monitor" block_resize '{"node-name":"disk","size":134217728}'
eventually 10 grep -qx 262144 /sys/block/vda/size
umount mounted
qmp "$monitor" block-export-del '{"id":"e"}'
[ ! -e /dev/vduse/d0 ] || fail "the device is left"
stop $daemon_pid
qemu-img check -q disk.qcow2
