#!/usr/bin/env python3
"""Virtual machines on a vhost-user-blk disk of stord: QEMU boots Debian's kernel, and the disk goes through what happens to it.

  machine.py CASE STORD DIRECTORY     DIRECTORY has kernel and initrd (scripts/vm files DIRECTORY obeys)

CASE is one of the functions below that say what they see to. Exit status 0 if all is well, else a message and what was logged.
"""
import base64
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

PATIENCE = 240
MIB = 1 << 20

# What was started, to be ended whatever happens.
STARTED = []


def eventually(what, condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def connect(path, seconds=PATIENCE):
    def attempt():
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            return None

    return eventually(f"{path} can be connected to", attempt, seconds)


class Qmp:
    def __init__(self, path, seconds=PATIENCE):
        self.sock = connect(path, seconds)
        self.sock.settimeout(PATIENCE)
        self.lines = self.sock.makefile("r")
        self.events = []
        json.loads(self.lines.readline())
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            message = json.loads(self.lines.readline())
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise AssertionError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]


class Stord:
    """stord with the image, exported under each of the names."""

    def __init__(self, program, directory, queues, exports=("disk",)):
        self.program, self.directory, self.queues, self.exports = program, directory, queues, exports
        self.starts = 0
        self.start()

    def start(self):
        self.starts += 1
        self.log = open(f"{self.directory}/stord-{self.starts}.log", "w")
        command = [
            self.program, "--chardev", f"socket,id=m,path={self.directory}/stord.qmp,server=on,wait=off", "--monitor", "m",
            "--blockdev", f"file,node-name=file,filename={self.directory}/disk.qcow2,discard=unmap",
            "--blockdev", "qcow2,node-name=disk,file=file,discard=unmap"]
        for name in self.exports:
            command += ["--export", f"vhost-user-blk,id={name},node-name=disk,writable=on,num-queues={self.queues},"
                        f"addr.type=unix,addr.path={self.directory}/{name}.sock"]
        # The kernel takes its time to let go of a killed daemon's files, and with them of its locks.
        eventually("stord starts", lambda: self.runs(command))

    def runs(self, command):
        """Starts it; false if it ended at once."""
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        STARTED.append(self.process)
        while self.process.poll() is None:
            try:
                self.qmp = Qmp(f"{self.directory}/stord.qmp", 0.2)
                return True
            except (AssertionError, OSError, ValueError):
                # Not yet, or it ended in the middle of that.
                pass
        return False

    def worked(self):
        """Processor time it has used, in ticks."""
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        assert status == 0, f"stord ended with {status}"


class Machine:
    """QEMU with the disk at a socket of stord's."""

    def __init__(self, directory, queues, name="machine", disk="disk", incoming=None):
        self.directory, self.name = directory, name
        self.log = open(f"{directory}/{name}.log", "w")
        cpus = max(2, queues)
        command = [
            "qemu-system-x86_64", "-M", "q35,memory-backend=mem,hpet=off", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off",
            "-smp", str(cpus), "-m", "1024", "-object", "memory-backend-memfd,id=mem,size=1024M,share=on",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", f"file:{directory}/{name}.console",
            "-chardev", f"socket,id=orders,path={directory}/{name}.orders,server=on,wait=off", "-serial", "chardev:orders",
            "-qmp", f"unix:{directory}/{name}.qmp,server=on,wait=off",
            "-chardev", f"socket,id=vu0,path={directory}/{disk}.sock,reconnect-ms=100",
            "-device", f"vhost-user-blk-pci,id=vu,chardev=vu0,num-queues={queues}",
            "-kernel", f"{directory}/kernel", "-initrd", f"{directory}/initrd",
            "-append", "console=ttyS0 loglevel=4 panic=-1 nowatchdog mitigations=off "
                       "rcupdate.rcu_cpu_stall_suppress=1 tsc=nowatchdog"]
        if incoming:
            command += ["-incoming", incoming]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        STARTED.append(self.process)
        self.qmp = Qmp(f"{directory}/{name}.qmp")
        self.serial = connect(f"{directory}/{name}.orders")
        self.buffer = b""

    def line(self, seconds=PATIENCE):
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            self.serial.settimeout(max(0.01, deadline - time.monotonic()))
            received = self.serial.recv(65536)
            assert received, "the machine has ended"
            self.buffer += received
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode(errors="replace").strip()

    def wait_ready(self):
        while self.line() != "<ready>":
            pass

    def begin(self, order):
        self.serial.sendall(order.encode() + b"\n")

    def end(self, seconds=PATIENCE):
        while True:
            line = self.line(seconds)
            if line.startswith("<") and line.endswith(">") and line != "<ready>":
                status, _, output = line[1:-1].partition(" ")
                return int(status), base64.b64decode(output).decode(errors="replace")

    def has_ended_order(self):
        return bool(self.buffer) or bool(select.select([self.serial], [], [], 0)[0])

    def do(self, order, seconds=PATIENCE):
        self.begin(order)
        status, output = self.end(seconds)
        assert status == 0, f"{order}: status {status}\n{output}"
        return output.strip()

    def kill(self):
        self.process.kill()
        self.process.wait()


VERIFY = ("fio --name=v --filename={file} --direct=1 --ioengine=libaio --rw=randrw --bsrange=4k-64k --iodepth=16 "
          "--numjobs={jobs} --size={size}M --offset_increment={size}M --io_size={size}M --verify=crc32c --verify_fatal=1 "
          "--verify_backlog=64 --do_verify=1 --output-format=terse --group_reporting")


def allocated(directory):
    """Bytes of data of the image."""
    text = subprocess.run(["qemu-img", "map", "-U", "--output=json", f"{directory}/disk.qcow2"],
                          check=True, capture_output=True, text=True).stdout
    return sum(extent["length"] for extent in json.loads(text) if extent["data"])


def make_image(directory, mib=512):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", f"{directory}/disk.qcow2", f"{mib}M"], check=True)


def check_image(directory, leaks=False):
    checked = subprocess.run(["qemu-img", "check", "-q", f"{directory}/disk.qcow2"])
    # Leaked clusters are all that a daemon may leave behind that was killed.
    assert checked.returncode == 0 or (leaks and checked.returncode == 3), checked


def life(program, directory, queues):
    make_image(directory)
    stord = Stord(program, directory, queues)
    machine = Machine(directory, queues)
    machine.wait_ready()
    assert machine.do("ls /sys/block/vda/mq | wc -l") == str(queues)
    assert machine.do("cat /sys/block/vda/size") == str(512 * MIB // 512)
    assert machine.do("cat /sys/block/vda/queue/write_cache") == "write back"
    # A file system and files in it.
    machine.do("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && cp -a /usr/bin /mnt/ && sync && umount /mnt")
    machine.do("e2fsck -fn /dev/vda && mount /dev/vda /mnt && diff -r /usr/bin /mnt/bin && umount /mnt")
    # Discards and zeroes reach the image.
    flush = "dd if=/dev/zero of=/dev/vda bs=512 seek=409600 count=1 conv=fsync"
    machine.do(f"dd if=/dev/urandom of=/dev/vda bs=1M count=64 oflag=direct && {flush}")
    full = allocated(directory)
    machine.do(f"blkdiscard -o 0 -l 33554432 /dev/vda && {flush}")
    assert allocated(directory) <= full - 32 * MIB, "a discard does not reach the image"
    machine.do("blkdiscard -z -o 33554432 -l 33554432 /dev/vda && cmp -n 33554432 -i 33554432:0 /dev/vda /dev/zero")
    # fio checks what it reads.
    machine.do(VERIFY.format(file="/dev/vda", jobs=queues, size=16))
    # Another length.
    stord.qmp("block_resize", node_name="disk", size=768 * MIB)
    eventually("the guest sees the new length", lambda: machine.do("cat /sys/block/vda/size") == str(768 * MIB // 512))
    machine.do("dd if=/dev/zero of=/dev/vda bs=1M seek=700 count=8 oflag=direct")
    # The guest starts anew.
    machine.do("echo before >/tmp/x && dd if=/tmp/x of=/dev/vda bs=512 count=1 conv=sync oflag=direct")
    machine.qmp("system_reset")
    machine.wait_ready()
    assert machine.do("head -c 6 /dev/vda") == "before"
    machine.do(VERIFY.format(file="/dev/vda", jobs=queues, size=4))
    # The front end is killed under load, and another comes.
    before = stord.worked()
    machine.begin(VERIFY.format(file="/dev/vda", jobs=queues, size=64))
    eventually("there is load", lambda: stord.worked() >= before + 5)
    machine.kill()
    machine = Machine(directory, queues)
    machine.wait_ready()
    machine.do(VERIFY.format(file="/dev/vda", jobs=queues, size=4))
    machine.kill()
    stord.stop()
    check_image(directory)


def one_queue(program, directory):
    """a disk's whole life with one queue"""
    life(program, directory, 1)


def four_queues(program, directory):
    """a disk's whole life with four queues"""
    life(program, directory, 4)


def restarts(program, directory):
    """stord is killed under load and started again: the guest waits and loses nothing"""
    make_image(directory)
    stord = Stord(program, directory, 2)
    machine = Machine(directory, 2)
    machine.wait_ready()
    machine.begin(VERIFY.format(file="/dev/vda", jobs=2, size=128))
    for _ in range(4):
        before = stord.worked()
        eventually("there is load", lambda: stord.worked() >= before + 5)
        stord.kill()
        stord.start()
    assert not machine.has_ended_order(), "it was over too soon to show anything"
    status, output = machine.end(600)
    assert status == 0, output
    errors = machine.do("dmesg | grep -c 'I/O error' || true")
    assert errors == "0", errors
    machine.kill()
    stord.stop()
    check_image(directory, leaks=True)


def migration(program, directory):
    """the guest moves to another QEMU while it writes and reads"""
    make_image(directory)
    stord = Stord(program, directory, 2, ("disk", "target"))
    machine = Machine(directory, 2)
    machine.wait_ready()
    target = Machine(directory, 2, "target", "target", f"unix:{directory}/migration.sock")
    # What is read goes through the guest's memory: a page that was sent too early shows as a wrong checksum.
    before = stord.worked()
    machine.begin(VERIFY.format(file="/dev/vda", jobs=2, size=128))
    eventually("there is load", lambda: stord.worked() >= before + 5)
    machine.qmp("migrate-set-parameters", max_bandwidth=64 * MIB, downtime_limit=2000)
    machine.qmp("migrate", uri=f"unix:{directory}/migration.sock")

    def status():
        info = machine.qmp("query-migrate")
        assert info["status"] not in ("failed", "cancelled"), info
        return info["status"] == "completed"

    eventually("the guest has moved", status, 600)
    machine.kill()
    assert not target.has_ended_order(), "it was over too soon to show anything"
    result, output = target.end(600)
    assert result == 0, output
    target.do("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct")
    target.kill()
    stord.stop()
    check_image(directory)


CASES = {case.__name__: case for case in (one_queue, four_queues, restarts, migration)}


def main():
    case, program, directory = sys.argv[1:]
    try:
        CASES[case](os.path.abspath(program), directory)
    except BaseException:
        for name in sorted(os.listdir(directory)):
            if name.endswith((".log", ".console")):
                with open(os.path.join(directory, name), errors="replace") as log:
                    print(f"-- {name}:\n{log.read()[-4000:]}", file=sys.stderr)
        raise
    finally:
        for process in STARTED:
            if process.poll() is None:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
