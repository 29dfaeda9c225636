//! Kinds of images that tests run over: made and filled by QEMU, and checked and read by QEMU afterwards.

use std::path::PathBuf;
use std::process::Command;

use stord_qmp::schema::block::BlockdevOptionsQcow2;
use tempfile::TempDir;

use super::harness::{Setup, assert_same, qemu, text};
use crate::testing::{MemoryDisk, Random, leaf};

/// What an image is made and driven with.
#[derive(Clone, Default)]
pub(super) struct Kind {
    /// For `qemu-img create -o`.
    pub(super) options: &'static str,
    pub(super) size: u64,
    pub(super) backing: bool,
    /// Guest data is in a file of its own.
    pub(super) data_file: bool,
    pub(super) small_cache: bool,
    /// Commands of `qemu-io` that fill the image.
    pub(super) filled: &'static [&'static str],
    /// The image has an internal snapshot of what it was filled with.
    pub(super) snapshot: bool,
    pub(super) driver_options: Option<fn(&mut BlockdevOptionsQcow2)>,
}

impl Kind {
    pub(super) fn describe(&self) -> String {
        let flags = [
            (self.backing, " with backing"),
            (self.data_file, " with data file"),
            (self.small_cache, " with small caches"),
            (self.snapshot, " with a snapshot"),
            (!self.filled.is_empty(), " filled"),
            (self.driver_options.is_some(), " with driver options"),
        ];
        let flags: String = flags
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, text)| text)
            .collect();
        format!("'{}'{flags}", self.options)
    }
}

const MIB: u64 = 1 << 20;

/// A bit of everything.
pub(super) const MIXED: &[&str] = &[
    "write -q -c -P 1 0 64k",
    "write -q -c -P 2 256k 512k",
    "write -q -P 3 1M 100k",
    "write -q -z 1200k 64k",
    "write -q -P 4 1300k 300k",
    "write -q -z 1400k 32k",
];

/// Many kinds of images.
pub(super) fn kinds() -> Vec<Kind> {
    let kind = |options, size| Kind {
        options,
        size,
        ..Kind::default()
    };
    let mut kinds = vec![
        kind("cluster_size=64k", 6 * MIB + 512),
        kind("cluster_size=512", MIB),
        kind("cluster_size=512,refcount_bits=64", MIB / 2 + 1024),
        kind("cluster_size=1024,refcount_bits=1", MIB),
        kind("cluster_size=4k,refcount_bits=2", 2 * MIB),
        kind("cluster_size=4k,refcount_bits=4", 2 * MIB),
        kind("cluster_size=4k,refcount_bits=8", 2 * MIB),
        kind("cluster_size=4k,refcount_bits=32", 2 * MIB),
        kind("cluster_size=4k,compat=0.10", 3 * MIB),
        kind("cluster_size=16k,extended_l2=on", 2 * MIB),
        kind("cluster_size=64k,extended_l2=on", 6 * MIB + 512),
        kind("cluster_size=2M", 9 * MIB),
    ];
    let large = |kind: &&Kind| kind.options.contains("2M");
    let with_backing: Vec<Kind> = kinds.iter().filter(|kind| !large(kind)).cloned().collect();
    kinds.extend(with_backing.into_iter().map(|kind| Kind {
        backing: true,
        ..kind
    }));
    kinds.push(kind("cluster_size=4k,lazy_refcounts=on", 2 * MIB));
    kinds.extend(special_kinds());
    kinds
}

fn special_kinds() -> Vec<Kind> {
    let kind = |options, size| Kind {
        options,
        size,
        ..Kind::default()
    };
    let filled = |options| Kind {
        filled: MIXED,
        ..kind(options, 2 * MIB)
    };
    let snapshot = |options| Kind {
        snapshot: true,
        ..filled(options)
    };
    vec![
        Kind {
            small_cache: true,
            ..kind("cluster_size=512", MIB)
        },
        Kind {
            small_cache: true,
            backing: true,
            ..kind("cluster_size=16k,extended_l2=on", 2 * MIB)
        },
        filled("cluster_size=4k"),
        filled("cluster_size=64k,compression_type=zstd"),
        filled("cluster_size=16k,extended_l2=on"),
        snapshot("cluster_size=4k"),
        snapshot("cluster_size=512"),
        snapshot("cluster_size=64k"),
        snapshot("cluster_size=16k,extended_l2=on"),
        Kind {
            backing: true,
            ..snapshot("cluster_size=4k")
        },
        Kind {
            data_file: true,
            ..kind("cluster_size=4k", 2 * MIB + 512)
        },
        Kind {
            data_file: true,
            ..kind("cluster_size=64k,data_file_raw=on", 2 * MIB + 512)
        },
        Kind {
            data_file: true,
            backing: true,
            ..kind("cluster_size=16k,extended_l2=on", 2 * MIB)
        },
        Kind {
            driver_options: Some(|options| options.discard_no_unref = Some(true)),
            ..filled("cluster_size=4k")
        },
        Kind {
            driver_options: Some(|options| options.pass_discard_other = Some(true)),
            ..snapshot("cluster_size=4k")
        },
        Kind {
            driver_options: Some(|options| options.pass_discard_request = Some(false)),
            ..filled("cluster_size=16k,extended_l2=on")
        },
    ]
}

/// Files of an image on the host, for QEMU.
pub(super) struct Files {
    dir: TempDir,
    source: String,
}

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn new(image: &[u8], backing: Option<&[u8]>, data: Option<&[u8]>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut files = Self {
            dir,
            source: String::new(),
        };
        let path = files.path("image.qcow2");
        std::fs::write(&path, image).expect("writes");
        files.source = format!("driver=qcow2,file.filename={}", text(&path));
        if let Some(backing) = backing {
            let path = files.path("backing");
            std::fs::write(&path, backing).expect("writes");
            let option = format!(
                ",backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
                text(&path)
            );
            files.source.push_str(&option);
        }
        if let Some(data) = data {
            let path = files.path("data");
            std::fs::write(&path, data).expect("writes");
            files.source.push_str(&format!(
                ",data-file.driver=file,data-file.filename={}",
                text(&path)
            ));
        }
        files
    }

    /// Has QEMU look for corruption, and for leaks unless they are allowed.
    pub(super) fn assert_consistent(&self, what: &str, may_leak: bool) {
        let output = Command::new("qemu-img")
            .args(["check", "--image-opts", &self.source])
            .output()
            .expect("qemu-img runs");
        let code = output.status.code();
        let fine = code == Some(0) || (may_leak && code == Some(3));
        if !fine {
            let _ = std::fs::copy(
                self.path("image.qcow2"),
                std::env::temp_dir().join("stord-bad.qcow2"),
            );
        }
        assert!(
            fine,
            "{what}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// What QEMU reads from the image or a snapshot in it.
    pub(super) fn content(&self, snapshot: Option<&str>) -> Vec<u8> {
        let raw = self.path("raw");
        let mut args = vec!["convert", "-O", "raw"];
        args.extend(snapshot.into_iter().flat_map(|name| ["-l", name]));
        args.extend(["--image-opts", &self.source, text(&raw)]);
        qemu("qemu-img", &args);
        std::fs::read(raw).expect("reads")
    }
}

/// Files below an image, and what it holds.
pub(super) struct Made {
    pub(super) file: MemoryDisk,
    pub(super) content: Vec<u8>,
    pub(super) backing: Option<Vec<u8>>,
    pub(super) data_file: Option<MemoryDisk>,
    pub(super) kind: Kind,
}

impl Made {
    pub(super) fn new(kind: &Kind) -> Self {
        let backing = kind.backing.then(|| backing_content(kind.size));
        let dir = tempfile::tempdir().expect("a directory");
        let (path, data) = (dir.path().join("image.qcow2"), dir.path().join("data"));
        let mut options = kind.options.to_owned();
        if kind.data_file {
            options.push_str(&format!(",data_file={}", text(&data)));
        }
        let size = kind.size.to_string();
        qemu(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &options,
                text(&path),
                &size,
            ],
        );
        if !kind.filled.is_empty() {
            let mut args: Vec<&str> = kind
                .filled
                .iter()
                .flat_map(|command| ["-c", command])
                .collect();
            args.push(text(&path));
            qemu("qemu-io", &args);
        }
        if kind.snapshot {
            qemu("qemu-img", &["snapshot", "-c", "before", text(&path)]);
        }
        let image = std::fs::read(&path).expect("the image");
        let data = kind
            .data_file
            .then(|| std::fs::read(&data).expect("the data file"));
        let content = Files::new(&image, backing.as_deref(), data.as_deref()).content(None);
        Self {
            file: MemoryDisk::new(image),
            content,
            backing,
            data_file: data.map(MemoryDisk::new),
            kind: kind.clone(),
        }
    }

    pub(super) fn setup(&self) -> Setup {
        self.setup_over(&self.file, self.data_file.clone())
    }

    /// How to open an image of this kind that is on other disks.
    pub(super) fn setup_over(&self, file: &MemoryDisk, data_file: Option<MemoryDisk>) -> Setup {
        let mut options = super::harness::defaults();
        if self.kind.small_cache {
            options.l2_cache_size = Some(512);
            options.l2_cache_entry_size = Some(512);
            options.refcount_cache_size = Some(0);
        }
        if let Some(change) = self.kind.driver_options {
            change(&mut options);
        }
        let backing = self
            .backing
            .as_ref()
            .map(|bytes| leaf(&MemoryDisk::new(bytes.clone())));
        Setup {
            backing,
            data_file,
            options: Some(options),
            ..Setup::new(file)
        }
    }

    /// Has QEMU check the image and compare its content, and that of its snapshot.
    pub(super) fn check(&self, content: &[u8], what: &str, may_leak: bool) {
        let data = self.data_file.as_ref().map(MemoryDisk::bytes);
        let image = self.file.bytes();
        let files = Files::new(&image, self.backing.as_deref(), data.as_deref());
        files.assert_consistent(what, may_leak);
        assert_same(content, &files.content(None), what);
        if self.kind.snapshot {
            assert_same(
                &self.content,
                &files.content(Some("before")),
                &format!("{what}: the snapshot"),
            );
        }
        if self.kind.options.contains("data_file_raw=on") {
            assert_same(
                content,
                &data.unwrap_or_default()[..content.len()],
                &format!("{what}: the data file"),
            );
        }
    }
}

/// Shorter than the image, and with zeroes in it.
fn backing_content(size: u64) -> Vec<u8> {
    let size = usize::try_from(size).expect("fits into memory");
    let byte = |at: usize| {
        if (at / 30_000).is_multiple_of(3) {
            0
        } else {
            u8::try_from(at % 251).expect("a byte")
        }
    };
    let mut bytes: Vec<u8> = (0..size * 3 / 4).map(byte).collect();
    bytes.truncate(bytes.len() & !511);
    let at = usize::try_from(Random::new(99).below(1000)).expect("small");
    bytes[at] = 77;
    bytes
}

/// Has QEMU look for corruption, and for leaks unless they are allowed.
pub(super) fn assert_consistent(image: &[u8], what: &str, may_leak: bool) {
    Files::new(image, None, None).assert_consistent(what, may_leak);
}

/// Has QEMU check an image without other files, and compare its content.
pub(super) fn check(image: &[u8], content: &[u8], what: &str) {
    assert_consistent(image, what, false);
    assert_same(content, &Files::new(image, None, None).content(None), what);
}
