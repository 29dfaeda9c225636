//! `stord mount` of the partitions of a disk: one of them as a file, or all of them as a directory.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::copy_file_range;

use crate::mount_command::{arg, mount, only_stord, qcow2_with, refused, umount};
use crate::needs;
use crate::support::daemon::run_to_end;
use crate::support::model::{assert_same, noise};
use crate::support::{Scratch, mounts, qemu};

/// A disk with three partitions whose content is noise, as its table's kind.
fn partitioned(scratch: &Scratch, label: &str) -> (String, Vec<u8>) {
    let mut content = noise(13, 24 << 20);
    content[..1 << 20].fill(0);
    let end = content.len();
    content[end - (1 << 20)..].fill(0);
    let raw = scratch.file("partitioned.raw", &content);
    let table = match label {
        "dos" => {
            "label: dos\nstart=2048,size=8192,type=83\nstart=12288,size=4096,type=83\n\
                  start=16384,size=28672,type=5\nstart=18432,size=4096,type=83\nstart=24576,size=2048,type=82\n"
        }
        _ => "label: gpt\nstart=2048,size=8192\nstart=12288,size=4096\nstart=18432,size=4096\n",
    };
    let mut sfdisk = Command::new(crate::support::prerequisites::find("sfdisk").unwrap())
        .args([
            "--quiet",
            "--no-reread",
            "--wipe=never",
            "--wipe-partitions=never",
        ])
        .arg(&raw)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    sfdisk
        .stdin
        .take()
        .unwrap()
        .write_all(table.as_bytes())
        .unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let content = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    (qcow2_with(scratch, "partitioned.qcow2", &content), content)
}

#[test]
fn one_partition_of_an_image() {
    only_stord!();
    needs!(root, "qemu-img", "sfdisk");
    let at = |start: usize, sectors: usize| start * 512..(start + sectors) * 512;
    for (label, parts) in [
        (
            "gpt",
            vec![
                (1, at(2048, 8192)),
                (2, at(12288, 4096)),
                (3, at(18432, 4096)),
            ],
        ),
        (
            "dos",
            vec![
                (1, at(2048, 8192)),
                (2, at(12288, 4096)),
                (5, at(18432, 4096)),
                (6, at(24576, 2048)),
            ],
        ),
    ] {
        let scratch = Scratch::new();
        let (image, mut content) = partitioned(&scratch, label);
        for (number, range) in parts {
            let number = number.to_string();
            let (_daemon, ended) = mount(
                &scratch,
                &["--partition", &number, &image, &arg(&scratch, "m")],
                "m",
            );
            assert!(
                ended.stdout.contains(&format!("partition {number}")),
                "{ended:?}"
            );
            assert_same(
                &format!("{label} {number}"),
                &fs::read(scratch.path("m")).unwrap(),
                &content[range.clone()],
            );
            // A write lands in the partition, and nothing gets past its end.
            let file = OpenOptions::new()
                .write(true)
                .open(scratch.path("m"))
                .unwrap();
            file.write_all_at(b"at the end", (range.len() - 10) as u64)
                .unwrap();
            assert!(file.write_at(b"past it", range.len() as u64).is_err());
            content[range.end - 10..range.end].copy_from_slice(b"at the end");
            drop(file);
            umount(&scratch, &arg(&scratch, "m"));
        }
        refused(
            &scratch,
            &["mount", "--partition=9", &image, &arg(&scratch, "m")],
            &["9"],
        );
        refused(
            &scratch,
            &["mount", "--partition=0", &image, &arg(&scratch, "m")],
            &["0"],
        );
        let image = scratch.path("partitioned.qcow2");
        assert_same(label, &qemu::content(&scratch, &image, "qcow2"), &content);
        qemu::assert_clean(&image);
    }
}

/// The bytes of a partition.
fn sectors(start: usize, count: usize) -> Range<usize> {
    start * 512..(start + count) * 512
}

#[test]
fn partitions_are_files_of_a_directory() {
    only_stord!();
    needs!(root, "qemu-img", "sfdisk");
    for (label, parts) in [
        (
            "gpt",
            vec![
                ("p1", sectors(2048, 8192)),
                ("p2", sectors(12288, 4096)),
                ("p3", sectors(18432, 4096)),
            ],
        ),
        (
            "dos",
            vec![
                ("p1", sectors(2048, 8192)),
                ("p2", sectors(12288, 4096)),
                ("p5", sectors(18432, 4096)),
                ("p6", sectors(24576, 2048)),
            ],
        ),
    ] {
        let scratch = Scratch::new();
        let (image, mut content) = partitioned(&scratch, label);
        let at = scratch.path("disk");
        let (mut daemon, ended) = mount(
            &scratch,
            &["--partitions", &image, at.to_str().unwrap()],
            "disk",
        );
        let count = format!("{} partitions", parts.len());
        assert!(ended.stdout.contains(&count), "{ended:?}");
        let mut names: Vec<_> = fs::read_dir(&at)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let mut wanted = vec!["disk.raw"];
        wanted.extend(parts.iter().map(|(name, _)| *name));
        assert_eq!(names, wanted);
        // Each file is its part of the disk, and what is written to it shows in the disk at once.
        let disk = File::open(at.join("disk.raw")).unwrap();
        for (name, range) in &parts {
            let got = fs::read(at.join(name)).unwrap();
            assert_same(&format!("{label} {name}"), &got, &content[range.clone()]);
            let part = OpenOptions::new().write(true).open(at.join(name)).unwrap();
            part.write_all_at(b"at the end", (range.len() - 10) as u64)
                .unwrap();
            assert!(part.write_at(b"past it", range.len() as u64).is_err());
            assert_eq!(
                part.set_len(4096).unwrap_err().raw_os_error(),
                Some(Errno::EPERM as i32)
            );
            content[range.end - 10..range.end].copy_from_slice(b"at the end");
            let mut seen = [0; 10];
            disk.read_exact_at(&mut seen, (range.end - 10) as u64)
                .unwrap();
            assert_eq!(&seen, b"at the end");
        }
        // Bytes go from one to the other inside the daemon.
        let (from, to) = (&parts[0], &parts[1]);
        let (source, target) = (at.join(from.0), at.join(to.0));
        let source = File::open(source).unwrap();
        let target = OpenOptions::new().write(true).open(target).unwrap();
        let copied = copy_file_range(&source, Some(&mut 4096), &target, Some(&mut 512), 1 << 20);
        assert_eq!(copied, Ok(1 << 20));
        content.copy_within(
            from.1.start + 4096..from.1.start + 4096 + (1 << 20),
            to.1.start + 512,
        );
        drop((disk, source, target));
        umount(&scratch, at.to_str().unwrap());
        daemon.assert_ends_well();
        assert_eq!(scratch.names(), ["partitioned.qcow2"]);
        let image = scratch.path("partitioned.qcow2");
        assert_same(label, &qemu::content(&scratch, &image, "qcow2"), &content);
        qemu::assert_clean(&image);
    }
}

#[test]
fn directory_of_partitions_cannot_be_changed() {
    only_stord!();
    needs!(root, "qemu-img", "sfdisk");
    let scratch = Scratch::new();
    let (image, _) = partitioned(&scratch, "gpt");
    let (_daemon, _) = mount(
        &scratch,
        &["--partitions", "--read-only", &image],
        "partitioned.qcow2.parts",
    );
    let at = scratch.path("partitioned.qcow2.parts");
    assert_eq!(fs::metadata(&at).unwrap().mode() & 0o7777, 0o500);
    let refused_with = |result: std::io::Result<()>, errno: Errno| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(errno as i32));
    };
    refused_with(File::create(at.join("new")).map(drop), Errno::EPERM);
    refused_with(fs::create_dir(at.join("new")), Errno::EPERM);
    refused_with(fs::remove_file(at.join("p1")), Errno::EPERM);
    refused_with(fs::rename(at.join("p1"), at.join("p9")), Errno::EPERM);
    refused_with(File::open(at.join("p4")).map(drop), Errno::ENOENT);
    let long = at.join("x".repeat(200));
    refused_with(File::open(long).map(drop), Errno::ENOENT);
    // Read-only files stay so, and others can be let in to read.
    assert_eq!(fs::metadata(at.join("p1")).unwrap().mode() & 0o7777, 0o400);
    let writable = OpenOptions::new().write(true).open(at.join("p1"));
    let written = writable.and_then(|file| file.write_all_at(b"x", 0));
    refused_with(written, Errno::EACCES);
    fs::set_permissions(&at, PermissionsExt::from_mode(0o555)).unwrap();
    assert_eq!(fs::metadata(&at).unwrap().mode() & 0o7777, 0o555);
    let whole = fs::metadata(at.join("disk.raw")).unwrap();
    assert_eq!((whole.len(), whole.ino()), (24 << 20, 2));
    umount(&scratch, &image);
    assert_eq!(scratch.names(), ["partitioned.qcow2"]);
}

#[test]
fn dead_directory_of_partitions_is_replaced() {
    only_stord!();
    needs!(root, "qemu-img", "sfdisk");
    let scratch = Scratch::new();
    let (image, content) = partitioned(&scratch, "gpt");
    let at = arg(&scratch, "disk");
    let (mut daemon, _) = mount(&scratch, &["--partitions", &image, &at], "disk");
    daemon.kill_hard();
    assert!(fs::read_dir(&at).is_err(), "the mount is dead");
    let (mut daemon, ended) = mount(&scratch, &["--partitions", &image, &at], "disk");
    assert!(ended.stderr.contains("dead"), "{ended:?}");
    let whole = fs::read(scratch.path("disk").join("disk.raw")).unwrap();
    assert_same("the disk", &whole, &content);
    assert_eq!(mounts::below(scratch.dir()).len(), 1, "nothing is stacked");
    daemon.kill_hard();
    umount(&scratch, &at);
    assert_eq!(scratch.names(), ["partitioned.qcow2"]);
}

#[test]
fn wrong_use_of_partitions_is_explained() {
    only_stord!();
    needs!(root, "qemu-img", "sfdisk");
    let scratch = Scratch::new();
    let (image, _) = partitioned(&scratch, "gpt");
    let at = arg(&scratch, "at");
    let plain = scratch.file("plain.raw", &noise(3, 1 << 20));
    let plain = plain.to_str().unwrap();
    refused(
        &scratch,
        &["mount", "--partitions", plain, &at],
        &["plain.raw", "there is no partition table"],
    );
    refused(
        &scratch,
        &["mount", "--partitions", &image, plain],
        &["no directory", "an empty directory"],
    );
    fs::create_dir(&at).unwrap();
    refused(
        &scratch,
        &["mount", &image, &at],
        &["it is a directory", "--partitions"],
    );
    fs::write(scratch.path("at").join("mine"), "precious").unwrap();
    refused(
        &scratch,
        &["mount", "--partitions", &image, &at],
        &["not empty"],
    );
    let both = run_to_end(&scratch, &["mount", "--partitions", "-p", "1", &image, &at]);
    assert!(both.stderr.contains("cannot be used with"), "{both:?}");
}
