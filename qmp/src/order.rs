//! The order in which the reference goes through the members of an object: that of its hash table. It shows where one of several
//! members at fault is named, and where an object is printed.

/// The number of the reference's buckets.
const BUCKETS: u32 = 512;

/// A member's place in the order.
pub fn rank(name: &str) -> u32 {
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let start = 0x238F_13AF_u32.wrapping_mul(length);
    let sum = name.bytes().enumerate().fold(start, |sum, (index, byte)| {
        sum.wrapping_add(u32::from(byte) << (index * 5 % 24))
    });
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_as_in_the_reference_s_table() {
        let mut names = [
            "file",
            "filename",
            "driver",
            "offset",
            "size",
            "backing",
            "read-zeroes",
        ];
        names.sort_by_key(|name| rank(name));
        let order = [
            "read-zeroes",
            "offset",
            "backing",
            "driver",
            "filename",
            "size",
            "file",
        ];
        assert_eq!(names, order);
    }
}
