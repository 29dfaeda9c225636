# File systems and verified load on vduse-blk devices, two exports at once; an export in use is not taken away.
# vm-seconds: 420
. /tests/functions.sh
. /tests/vduse.sh
modprobe -a xfs btrfs

qemu-img create -q -f qcow2 one.qcow2 400M
truncate -s 64M two.raw
daemon stord \
    --blockdev driver=file,node-name=one-file,filename=one.qcow2,discard=unmap \
    --blockdev driver=qcow2,node-name=one,file=one-file,discard=unmap \
    --blockdev driver=file,node-name=two,filename=two.raw
export_disk one one ',"writable":true,"num-queues":2'
export_disk two two ',"writable":true,"num-queues":4'
plug two; second=$disk
plug one; first=$disk

load() { # DISK NAME
    fio --name="$2" --filename="$1" --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=4M --numjobs=4 \
        --offset_increment=8M --verify=crc32c --group_reporting --minimal >"$2.log" 2>&1 || { cat "$2.log"; fail "fio on $1"; }
}

echo "-- verified load at depth 32 by 4 jobs, on both at once"
load "$first" load-one & other=$!
load "$second" load-two
wait $other || fail "load on the first"

mkdir -p mounted
for kind in ext4 xfs btrfs; do
    echo "-- $kind"
    case $kind in
        ext4) mkfs.ext4 -q -F "$first"; check() { e2fsck -fn "$first"; } ;;
        xfs) mkfs.xfs -q -f "$first"; check() { xfs_repair -n "$first"; } ;;
        btrfs) mkfs.btrfs -q -f "$first"; check() { btrfs check "$first"; } ;;
    esac
    mount -t $kind "$first" mounted
    cp -r /usr/lib/modules mounted/
    if [ $kind = ext4 ]; then
        echo "-- an export in use stays"
        refuses "still in use" qmp "$monitor" block-export-del '{"id":"one"}'
    fi
    umount mounted
    mount -t $kind "$first" mounted
    diff -r /usr/lib/modules mounted/modules
    umount mounted
    check >check.log 2>&1 || { cat check.log; fail "the check of $kind"; }
done
unplug one
unplug two
withdraw one
withdraw two
stop $daemon_pid
qemu-img check -q one.qcow2
