//! Tables made by hand, good and bad.

use super::gpt::crc32;
use super::*;

const DISK_SIZE: usize = 8 << 20;

fn disk(bytes: Vec<u8>) -> Disk<impl AsyncFn(u64, usize) -> Result<Vec<u8>, Errno>> {
    Disk {
        size: bytes.len() as u64,
        read: async move |offset: u64, len: usize| {
            let at = usize::try_from(offset).expect("a small disk");
            Ok(bytes[at..at + len].to_vec())
        },
    }
}

fn list(bytes: Vec<u8>) -> Result<Vec<(u32, u64, u64)>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime without drivers");
    let partitions = runtime.block_on(disk(bytes).table());
    let tuples = |table: Table| table.0.iter().map(|p| (p.number, p.start, p.len)).collect();
    partitions.map(tuples).map_err(|error| error.message)
}

fn put_entry(bytes: &mut [u8], sector: u64, index: usize, kind: u8, start: u32, len: u32) {
    let sector = usize::try_from(sector * SECTOR).expect("a small disk");
    bytes[sector + 510..sector + 512].copy_from_slice(&[0x55, 0xaa]);
    let at = sector + 446 + index * 16;
    bytes[at + 4] = kind;
    bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    bytes[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
}

#[test]
fn primary_and_logical_partitions_are_numbered_as_by_the_kernel() {
    let mut bytes = vec![0; DISK_SIZE];
    put_entry(&mut bytes, 0, 0, 0x83, 2048, 1024);
    put_entry(&mut bytes, 0, 2, 0x05, 4096, 8192);
    put_entry(&mut bytes, 4096, 0, 0x83, 63, 100);
    put_entry(&mut bytes, 4096, 1, 0x05, 1000, 1000);
    put_entry(&mut bytes, 5096, 0, 0x83, 63, 200);
    assert_eq!(
        list(bytes),
        Ok(vec![
            (1, 2048 * 512, 1024 * 512),
            (3, 4096 * 512, 8192 * 512),
            (5, (4096 + 63) * 512, 100 * 512),
            (6, (5096 + 63) * 512, 200 * 512),
        ])
    );
}

#[test]
fn endless_chain_of_logical_partitions_is_noticed() {
    let mut bytes = vec![0; DISK_SIZE];
    put_entry(&mut bytes, 0, 0, 0x0f, 4096, 8192);
    put_entry(&mut bytes, 4096, 0, 0x83, 63, 100);
    put_entry(&mut bytes, 4096, 1, 0x05, 0, 1000);
    assert_eq!(
        list(bytes),
        Err("the chain of logical partitions does not end".to_owned())
    );
}

#[test]
fn partition_outside_the_disk_is_refused() {
    let mut bytes = vec![0; DISK_SIZE];
    put_entry(&mut bytes, 0, 1, 0x83, 2048, 1 << 20);
    assert_eq!(
        list(bytes),
        Err("partition 2 is not inside the image".to_owned())
    );
}

#[test]
fn disk_without_a_table_says_so() {
    for bytes in [Vec::new(), vec![0; 100], vec![0; DISK_SIZE]] {
        assert_eq!(list(bytes), Err("there is no partition table".to_owned()));
    }
    let mut boot_sector = vec![0xeb; DISK_SIZE];
    boot_sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert!(list(boot_sector).is_err());
}

fn put_gpt(bytes: &mut [u8], block_size: usize, block: usize, entries_block: usize) {
    let mut entries = vec![0; 128 * 128];
    for (index, first, last) in [(0, 100_u64, 199_u64), (4, 300, 300)] {
        let entry = &mut entries[index * 128..][..128];
        entry[..16].fill(0x11);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
    }
    let mut header = vec![0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[12..16].copy_from_slice(&92_u32.to_le_bytes());
    header[24..32].copy_from_slice(&(block as u64).to_le_bytes());
    header[72..80].copy_from_slice(&(entries_block as u64).to_le_bytes());
    header[80..84].copy_from_slice(&128_u32.to_le_bytes());
    header[84..88].copy_from_slice(&128_u32.to_le_bytes());
    header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    let checksum = crc32(&header);
    header[16..20].copy_from_slice(&checksum.to_le_bytes());
    bytes[block * block_size..][..92].copy_from_slice(&header);
    bytes[entries_block * block_size..][..entries.len()].copy_from_slice(&entries);
}

fn protective(block_size: usize) -> Vec<u8> {
    let mut bytes = vec![0; DISK_SIZE];
    put_entry(&mut bytes, 0, 0, 0xee, 1, u32::MAX);
    put_gpt(&mut bytes, block_size, 1, 2);
    bytes
}

#[test]
fn gpt_partitions_are_found_with_both_block_sizes() {
    for block_size in [512, 4096] {
        let unit = block_size as u64;
        assert_eq!(
            list(protective(block_size)),
            Ok(vec![(1, 100 * unit, 100 * unit), (5, 300 * unit, unit)])
        );
    }
}

#[test]
fn backup_stands_in_for_a_damaged_table() {
    let last = DISK_SIZE / 512 - 1;
    for damaged_at in [512 + 40, 1024 + 32] {
        let mut bytes = protective(512);
        put_gpt(&mut bytes, 512, last, last - 32);
        bytes[damaged_at] ^= 1;
        assert_eq!(list(bytes).map(|list| list.len()), Ok(2));
    }
}

#[test]
fn damaged_table_without_a_backup_is_not_trusted() {
    let mut bytes = protective(512);
    bytes[1024 + 40] ^= 1;
    assert_eq!(
        list(bytes),
        Err("the GUID partition table and its backup are damaged".to_owned())
    );
}

#[test]
fn checksum_is_the_standard_s() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn missing_partition_names_those_that_exist() {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime without drivers");
    let error = runtime
        .block_on(disk(protective(512)).table())
        .expect("a good table")
        .partition(3)
        .expect_err("there is none");
    assert_eq!(error.message, "there is no partition 3");
    assert_eq!(
        error.hint.as_deref(),
        Some("Partitions: 1 (50 KiB), 5 (512 bytes)")
    );
}
