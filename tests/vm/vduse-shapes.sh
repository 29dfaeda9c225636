# vduse-blk with all kinds of queues and block sizes: the device has them, and its content is the image's, both ways.
# vm-seconds: 300
# vm-cpus: 4
. /tests/functions.sh
. /tests/vduse.sh

dd if=/dev/urandom of=expected.raw bs=1M count=12 status=none
cp expected.raw disk.raw
qemu-img convert -f raw -O qcow2 expected.raw disk.qcow2
daemon stord \
    --blockdev driver=file,node-name=raw-file,filename=disk.raw --blockdev driver=raw,node-name=raw,file=raw-file \
    --blockdev driver=file,node-name=qcow2-file,filename=disk.qcow2 --blockdev driver=qcow2,node-name=qcow2,file=qcow2-file

round=0
while read -r node queues size block; do
    echo "-- $node, $queues queues of $size, blocks of $block"
    round=$((round + 1))
    export_disk "$node" shape ",\"writable\":true,\"num-queues\":$queues,\"queue-size\":$size,\"logical-block-size\":$block,\"serial\":\"shape-$round\""
    plug shape
    [ "$(queue logical_block_size)" = "$block" ] || fail "logical_block_size is $(queue logical_block_size)"
    [ "$(cat "/sys/block/${disk#/dev/}/serial")" = "shape-$round" ] || fail "serial is $(cat "/sys/block/${disk#/dev/}/serial")"
    [ "$(cat "/sys/block/${disk#/dev/}/size")" = $((12 << 11)) ] || fail "size is $(cat "/sys/block/${disk#/dev/}/size")"
    # The kernel uses no more queues than it has processors.
    used=$(ls "/sys/block/${disk#/dev/}/mq" | wc -l)
    [ "$used" = $((queues < $(nproc) ? queues : $(nproc))) ] || fail "$used queues are in use"
    cmp "$disk" expected.raw
    # One block, and requests of many segments, through the cache and around it; all rounds in other places.
    dd if=/dev/urandom of=part bs="$block" count=1 status=none
    dd if=part of="$disk" bs="$block" seek=$((round * 3)) oflag=direct conv=notrunc status=none
    dd if=part of=expected.raw bs="$block" seek=$((round * 3)) conv=notrunc status=none
    dd if=/dev/urandom of=part bs=1M count=2 status=none
    dd if=part of="$disk" bs=1M seek=$((round % 10)) conv=notrunc,fsync status=none
    dd if=part of=expected.raw bs=1M seek=$((round % 10)) conv=notrunc status=none
    unplug shape
    withdraw shape
    # The other image gets what this one got, so that both are as expected.
    qemu-img compare -q -U -f "$node" -F raw "disk.$node" expected.raw || fail "the image differs from what was written"
    for other in raw qcow2; do
        [ "$other" = "$node" ] && continue
        export_disk $other shape ',"writable":true'
        plug shape
        dd if=expected.raw of="$disk" bs=1M oflag=direct conv=notrunc,fsync status=none
        unplug shape
        withdraw shape
    done
done <<END
raw 1 2 512
qcow2 4 1024 4096
raw 4 256 1024
qcow2 1 64 2048
raw 1 1024 4096
qcow2 4 2 512
END
stop $daemon_pid
qemu-img compare -q disk.raw disk.qcow2
qemu-img check -q disk.qcow2
