//! The group in which a server without elliptic curves agrees on keys: that of the file if there is
//! one, else a well-known one of 2048 bits.

use openssl::bn::BigNum;
use openssl::dh::Dh;
use openssl::error::ErrorStack;
use openssl::pkey::Params;

/// The prime of the group `ffdhe2048` (RFC 7919, appendix A.1).
const FFDHE_2048: &str = "\
    FFFFFFFFFFFFFFFFADF85458A2BB4A9AAFDC5620273D3CF1D8B9C583CE2D3695A9E13641146433FB\
    CC939DCE249B3EF97D2FE363630C75D8F681B202AEC4617AD3DF1ED5D5FD65612433F51F5F066ED0\
    856365553DED1AF3B557135E7F57C935984F0C70E0E68B77E2A689DAF3EFE8721DF158A136ADE735\
    30ACCA4F483A797ABC0AB182B324FB61D108A94BB2C8E3FBB96ADAB760D7F4681D4F42A3DE394DF4\
    AE56EDE76372BB190B07A7C8EE0A6D709E02FCE1CDF7E2ECC03404CD28342F619172FE9CE98583FF\
    8E4F1232EEF28183C3FE3B1B4C6FAD733BB5FCBC2EC22005C58EF1837D1683B2C6F34A26C1B2EFFA\
    886B423861285C97FFFFFFFFFFFFFFFF";

/// The well-known group.
pub fn well_known() -> Result<Dh<Params>, ErrorStack> {
    Dh::from_pqg(
        BigNum::from_hex_str(FFDHE_2048)?,
        None,
        BigNum::from_u32(2)?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_known_group_is_sound() {
        let group = well_known().expect("it is well-known");
        assert_eq!(group.prime_p().num_bits(), 2048);
        assert!(group.check_key().expect("memory"));
    }
}
