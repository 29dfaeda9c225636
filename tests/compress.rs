//! The `compress` filter: what is written through it is stored compressed, and QEMU reads it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::needs;
use crate::support::daemon::{Daemon, run_to_end};
use crate::support::{Scratch, qemu};

fn compressed_clusters(image: &Path) -> u64 {
    let args = [
        "check",
        "-f",
        "qcow2",
        "--output=json",
        image.to_str().unwrap(),
    ];
    let report: Value = serde_json::from_str(&qemu::img(&args)).unwrap();
    report["compressed-clusters"].as_u64().unwrap_or(0)
}

#[test]
fn writes_through_it_are_compressed() {
    needs!(root, "qemu-img");
    for options in ["", "compression_type=zstd", "extended_l2=on"] {
        let scratch = Scratch::new();
        let image = scratch.path("disk.qcow2");
        // The last cluster is not whole.
        let size = (8 << 20) + 4096;
        qemu::create(&image, size, options);
        let mount = scratch.empty_file("mount");
        let node = "driver=compress,node-name=disk,file.driver=qcow2,file.file.driver=file,file.file.filename=disk.qcow2";
        let args = [
            "--blockdev",
            node,
            "--export",
            "fuse,id=e,node-name=disk,mountpoint=mount,writable=on",
        ];
        let daemon = Daemon::start(&scratch, &args);
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&mount)
            .unwrap();
        let mut model = vec![0; usize::try_from(size).unwrap()];
        // Whole clusters, parts of them, over what is there, and the end.
        let writes = [
            (0, 4 << 20, 3),
            (100_000, 5000, 4),
            (6 << 20, 65536, 5),
            ((8 << 20) + 100, 3996, 6),
            (1 << 20, 1 << 20, 7),
        ];
        for (at, len, byte) in writes {
            disk.write_all_at(&vec![byte; len], at).unwrap();
            let at = usize::try_from(at).unwrap();
            model[at..at + len].fill(byte);
        }
        let mut noise = vec![0; 65536];
        let mut state = 1u32;
        for byte in &mut noise {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_be_bytes()[0];
        }
        disk.write_all_at(&noise, 5 << 20).unwrap();
        model[5 << 20..][..65536].copy_from_slice(&noise);
        let mut read = vec![0; model.len()];
        disk.read_exact_at(&mut read, 0).unwrap();
        assert!(read == model, "{options}");
        drop(disk);
        daemon.stop();
        qemu::assert_clean(&image);
        assert!(
            qemu::content(&scratch, &image, "qcow2") == model,
            "{options}"
        );
        let count = compressed_clusters(&image);
        assert_eq!(count, 64 + 1 + 1, "{options}");
        assert!(image.metadata().unwrap().len() < 1 << 20, "{options}");
    }
}

#[test]
fn formats_without_compression_are_refused() {
    let scratch = Scratch::new();
    scratch.file("disk.raw", &[0; 65536]);
    for (child, name) in [
        (
            "raw,file.file.driver=file,file.file.filename=disk.raw",
            "raw",
        ),
        ("file,file.filename=disk.raw", "file"),
    ] {
        let node = format!("driver=compress,node-name=disk,file.driver={child}");
        let ended = run_to_end(&scratch, &["--blockdev", &node]);
        assert_eq!(ended.code, Some(1));
        let told = format!("Compression is not supported for underlying format: {name}\n");
        assert!(ended.stderr.ends_with(&told), "{ended:?}");
    }
}
