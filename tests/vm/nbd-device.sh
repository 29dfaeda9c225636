# The kernel's NBD client on stord's server: unix and tcp, several connections, a file system, verified load, trim, a new size, a lost server.
# vm-seconds: 240
. /tests/functions.sh

modprobe nbd nbds_max=4
socket=$PWD/nbd.sock
disk=/dev/nbd0

serve() { # FORMAT SIZE SERVER-ADDRESS
    daemon stord --blockdev "driver=file,node-name=file,filename=disk.$1,discard=unmap" \
        --blockdev "driver=$1,node-name=disk,file=file,discard=unmap" \
        --nbd-server "$2" --export type=nbd,id=export,node-name=disk,name=disk,writable=on
}
size_is() { [ "$(cat /sys/block/nbd0/size)" = $(($1 / 512)) ]; }
disconnect() {
    nbd-client -d $disk >/dev/null
    eventually 30 size_is 0
}
# Connections that the server accepted have its name, and one more entry is the listener's.
connections() { echo $(($(grep -c "$socket" /proc/net/unix) - 1)); }

echo "-- unix: size, file system, content kept over a new connection"
qemu-img create -q -f qcow2 disk.qcow2 256M
serve qcow2 "addr.type=unix,addr.path=$socket"
nbd-client -u "$socket" -N disk $disk
eventually 30 size_is $((256 << 20))
mkfs.ext4 -q $disk
mkdir -p mounted
mount $disk mounted
cp -r /usr/lib/modules mounted/
umount mounted
e2fsck -fn $disk >/dev/null
disconnect
nbd-client -u "$socket" -N disk $disk
eventually 30 size_is $((256 << 20))
mount -o ro $disk mounted
diff -r /usr/lib/modules mounted/modules
umount mounted

echo "-- trim reaches the image"
blkdiscard -f $disk
sync $disk
qemu-img map -U --output=json disk.qcow2 >map.json
jq -e 'all(.data == false)' map.json >/dev/null || fail "trimmed, but the image has data: $(cat map.json)"
disconnect

echo "-- a size changed meanwhile"
qmp "$monitor" block_resize "{\"node-name\":\"disk\",\"size\":$((320 << 20))}" >/dev/null
nbd-client -u "$socket" -N disk $disk
eventually 30 size_is $((320 << 20))
disconnect

echo "-- four connections under verified load"
nbd-client -u "$socket" -N disk -C 4 $disk
eventually 30 size_is $((320 << 20))
[ "$(connections)" = 4 ] || fail "not four connections: $(connections)"
fio --name=load --filename=$disk --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=6M --numjobs=4 \
    --offset_increment=8M --verify=crc32c --group_reporting --minimal >fio.log 2>&1 || { cat fio.log; fail "fio"; }

echo "-- the server dies: requests fail, and a new server is taken"
echo "kept over the crash" | dd of=$disk bs=4096 seek=70000 conv=sync oflag=direct status=none
sync $disk
kill -9 $daemon_pid
wait $daemon_pid || true
refuses "rror" dd if=$disk of=/dev/null bs=4096 count=1 skip=9999 iflag=direct
nbd-client -d $disk >/dev/null 2>&1 || true
eventually 30 size_is 0
rm -f "$socket"
serve qcow2 "addr.type=unix,addr.path=$socket"
nbd-client -u "$socket" -N disk -C 2 $disk
eventually 30 size_is $((320 << 20))
dd if=$disk bs=4096 skip=70000 count=1 iflag=direct status=none | grep -aq "kept over the crash"
disconnect
stop $daemon_pid
qemu-img check -q disk.qcow2

echo "-- tcp, raw, read-only"
dd if=/dev/urandom of=disk.raw bs=1M count=16 status=none
serve raw addr.type=inet,addr.host=127.0.0.1,addr.port=10809
nbd-client 127.0.0.1 10809 -N disk $disk
eventually 30 size_is $((16 << 20))
cmp $disk disk.raw
dd if=/dev/zero of=$disk bs=64k count=3 seek=5 oflag=direct conv=notrunc status=none
cmp $disk disk.raw
disconnect
qmp "$monitor" block-export-add '{"type":"nbd","id":"fixed","node-name":"disk","name":"fixed","writable":false}' >/dev/null
nbd-client 127.0.0.1 10809 -N fixed $disk
eventually 30 size_is $((16 << 20))
[ "$(blockdev --getro $disk)" = 1 ] || fail "the device is writable"
disconnect
stop $daemon_pid
