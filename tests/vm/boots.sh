# The machine itself: stord and QEMU's daemon run in it and answer, and the modules load.
. /tests/functions.sh

for module in vduse virtio_vdpa virtio_blk nbd ublk_drv loop xfs btrfs; do
    modprobe $module
done
qemu-img create -q -f qcow2 disk.qcow2 64M
for program in stord qemu-storage-daemon; do
    daemon $program --blockdev driver=file,node-name=file,filename=disk.qcow2 --blockdev driver=qcow2,node-name=disk,file=file
    [ "$(qmp "$monitor" query-named-block-nodes | jq length)" = 2 ] || fail "$program does not show its nodes"
    refuses "Cannot find device" qmp "$monitor" block_resize '{"node-name":"none","size":1}'
    stop $daemon_pid
done
