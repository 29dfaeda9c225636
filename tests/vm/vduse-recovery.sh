# A daemon of a VDUSE device that dies is replaced by another: nothing is lost, written twice, or seen as an error by users.
# vm-seconds: 1500
. /tests/functions.sh
modprobe -a vduse virtio_vdpa virtio_blk

options() { # FORMAT QUEUES
    echo --blockdev driver=file,node-name=file,filename=disk."$1" --blockdev driver="$1",node-name=disk,file=file \
        --export vduse-blk,id=e,node-name=disk,name=d0,writable=on,num-queues="$2",attach=on
}

serve() { daemon stord $(options "$1" "$2"); } # FORMAT QUEUES

die() { kill -9 "$daemon_pid"; wait "$daemon_pid" 2>/dev/null || true; }

# How many requests the kernel has got back.
done_so_far() { awk '{ print $1 + $5 }' /sys/block/vda/stat; }
has_gone_on() { [ "$(done_so_far)" -gt $((at + 300)) ]; }

# Requests that the kernel has sent and not got back.
is_busy() { [ "$(awk '{ print $1 + $2 }' /sys/block/vda/inflight)" -gt 0 ]; }

record=/run/stord/vduse/d0

# Killed again and again under a load that is verified, which sees nothing of it.
for case in "raw 1" "qcow2 4"; do
    set -- $case
    qemu-img create -q -f "$1" "disk.$1" 64M
    serve "$1" "$2"
    fio --name=load --filename=/dev/vda --rw=randwrite --bs=4k --size=16M --iodepth=16 --ioengine=libaio --direct=1 \
        --verify=crc32c --verify_fatal=1 --loops=2 --eta=never --output=fio.log &
    load=$!
    for _ in $(seq "${KILLS:-5}"); do
        kill -0 $load 2>/dev/null || break
        at=$(done_so_far)
        eventually 120 has_gone_on
        die
        serve "$1" "$2"
    done
    wait $load || { cat fio.log; fail "the load saw an error ($case)"; }
    # What the device shows is what the image holds.
    dd if=/dev/vda of=device.raw bs=1M status=none
    stop $daemon_pid
    [ ! -e /dev/vduse/d0 ] || fail "the device is left"
    [ ! -e $record ] || fail "the record is left"
    qemu-img convert -O raw "disk.$1" copy.raw
    cmp copy.raw device.raw || fail "the image is not what the device showed ($case)"
    qemu-img check -q "disk.$1" || [ "$1" = raw ] || fail "the image is damaged"
done

# A daemon that is told to end leaves a mounted disk to the next.
qemu-img create -q -f raw disk.raw 64M
serve raw 1
mkfs.ext4 -q /dev/vda
mkdir mounted
mount /dev/vda mounted
cp /usr/bin/qemu-img mounted/
stop $daemon_pid
[ -e /dev/vduse/d0 ] || fail "a disk in use was removed"

# What does not fit the device is refused, and the device stays as it is.
refuses "num-queues '1', not '2'" stord $(options raw 2)
cp disk.raw other.raw
refuses "image '.*/disk.raw', not '.*/other.raw'" stord $(options raw 1 | sed s/disk.raw/other.raw/)
truncate -s 32M disk.raw
refuses "the image has only 33554432 now" stord $(options raw 1)
truncate -s 64M disk.raw
cp other.raw disk.raw

# A record that somebody else made, or could have.
chown nobody $record
refuses "belongs to somebody else" stord $(options raw 1)
chown root $record
mv $record kept
ln -s "$PWD/kept" $record
refuses "requests in flight are noted" stord $(options raw 1)
mv kept $record
serve raw 1
refuses "another process serves" stord $(options raw 1 | sed 's/,node-name=file,/,locking=off&/')
cmp mounted/qemu-img /usr/bin/qemu-img
umount mounted
e2fsck -fn /dev/vda >/dev/null

# Without a record, a device with nothing under way goes on.
die
if is_busy; then fail "somebody uses a disk that is not mounted"; fi
rm $record
serve raw 1
e2fsck -fn /dev/vda >/dev/null

# With something under way it does not: that would be to guess.
dd if=/dev/zero of=/dev/vda bs=64k count=512 oflag=direct status=none &
load=$!
eventually 60 is_busy
die
if is_busy; then
    mv $record kept
    head -c 12352 /dev/zero >$record
    chmod 600 $record
    refuses "does not say which" stord $(options raw 1)
    mv kept $record
fi
serve raw 1
wait $load || fail "dd saw an error"

# Half removed: the daemon dies while the device is taken off the bus.
die
vdpa dev del d0 &
removal=$!
sleep 1 # it hangs now: there is nobody to answer
kill -0 $removal || fail "the removal does not wait for a daemon"
serve raw 1
wait $removal || fail "the removal failed"
[ "$(qmp "$monitor" query-block-exports | jq -r '.[0].device')" = /dev/vda ] || fail "the device did not come back"
cmp -n 1048576 /dev/zero /dev/vda

# Off the bus, but still there: it is made anew, with whatever options.
vdpa dev del d0
die
[ -e /dev/vduse/d0 ] || fail "the device should have been left"
serve raw 2
stop $daemon_pid
[ ! -e /dev/vduse/d0 ] || fail "the device is left"
