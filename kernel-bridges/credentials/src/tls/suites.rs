//! What OpenSSL and GnuTLS both know, by the names that each gives it.

/// A cipher suite of TLS 1.2.
pub struct Suite {
    /// OpenSSL's name.
    pub name: &'static str,
    /// How keys are agreed on, in GnuTLS's words.
    pub exchange: &'static str,
    /// What encrypts, in GnuTLS's words.
    pub cipher: &'static str,
    /// What authenticates, in GnuTLS's words.
    pub mac: &'static str,
}

const fn suite(
    name: &'static str,
    exchange: &'static str,
    cipher: &'static str,
    mac: &'static str,
) -> Suite {
    Suite {
        name,
        exchange,
        cipher,
        mac,
    }
}

/// The suites of TLS 1.2, the preferred ones first.
pub const SUITES: &[Suite] = &[
    suite(
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA",
        "AES-256-GCM",
        "AEAD",
    ),
    suite(
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-RSA",
        "AES-256-GCM",
        "AEAD",
    ),
    suite(
        "DHE-RSA-AES256-GCM-SHA384",
        "DHE-RSA",
        "AES-256-GCM",
        "AEAD",
    ),
    suite(
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA",
        "CHACHA20-POLY1305",
        "AEAD",
    ),
    suite(
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-RSA",
        "CHACHA20-POLY1305",
        "AEAD",
    ),
    suite(
        "DHE-RSA-CHACHA20-POLY1305",
        "DHE-RSA",
        "CHACHA20-POLY1305",
        "AEAD",
    ),
    suite(
        "ECDHE-ECDSA-AES256-CCM",
        "ECDHE-ECDSA",
        "AES-256-CCM",
        "AEAD",
    ),
    suite("DHE-RSA-AES256-CCM", "DHE-RSA", "AES-256-CCM", "AEAD"),
    suite(
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA",
        "AES-128-GCM",
        "AEAD",
    ),
    suite(
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-RSA",
        "AES-128-GCM",
        "AEAD",
    ),
    suite(
        "DHE-RSA-AES128-GCM-SHA256",
        "DHE-RSA",
        "AES-128-GCM",
        "AEAD",
    ),
    suite(
        "ECDHE-ECDSA-AES128-CCM",
        "ECDHE-ECDSA",
        "AES-128-CCM",
        "AEAD",
    ),
    suite("DHE-RSA-AES128-CCM", "DHE-RSA", "AES-128-CCM", "AEAD"),
    suite(
        "ECDHE-ECDSA-AES256-SHA384",
        "ECDHE-ECDSA",
        "AES-256-CBC",
        "SHA384",
    ),
    suite(
        "ECDHE-RSA-AES256-SHA384",
        "ECDHE-RSA",
        "AES-256-CBC",
        "SHA384",
    ),
    suite("DHE-RSA-AES256-SHA256", "DHE-RSA", "AES-256-CBC", "SHA256"),
    suite(
        "ECDHE-ECDSA-AES128-SHA256",
        "ECDHE-ECDSA",
        "AES-128-CBC",
        "SHA256",
    ),
    suite(
        "ECDHE-RSA-AES128-SHA256",
        "ECDHE-RSA",
        "AES-128-CBC",
        "SHA256",
    ),
    suite("DHE-RSA-AES128-SHA256", "DHE-RSA", "AES-128-CBC", "SHA256"),
    suite(
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-ECDSA",
        "AES-256-CBC",
        "SHA1",
    ),
    suite("ECDHE-RSA-AES256-SHA", "ECDHE-RSA", "AES-256-CBC", "SHA1"),
    suite("DHE-RSA-AES256-SHA", "DHE-RSA", "AES-256-CBC", "SHA1"),
    suite(
        "ECDHE-ECDSA-AES128-SHA",
        "ECDHE-ECDSA",
        "AES-128-CBC",
        "SHA1",
    ),
    suite("ECDHE-RSA-AES128-SHA", "ECDHE-RSA", "AES-128-CBC", "SHA1"),
    suite("DHE-RSA-AES128-SHA", "DHE-RSA", "AES-128-CBC", "SHA1"),
    suite("AES256-GCM-SHA384", "RSA", "AES-256-GCM", "AEAD"),
    suite("AES256-CCM", "RSA", "AES-256-CCM", "AEAD"),
    suite("AES128-GCM-SHA256", "RSA", "AES-128-GCM", "AEAD"),
    suite("AES128-CCM", "RSA", "AES-128-CCM", "AEAD"),
    suite("AES256-SHA256", "RSA", "AES-256-CBC", "SHA256"),
    suite("AES128-SHA256", "RSA", "AES-128-CBC", "SHA256"),
    suite("AES256-SHA", "RSA", "AES-256-CBC", "SHA1"),
    suite("AES128-SHA", "RSA", "AES-128-CBC", "SHA1"),
    suite(
        "ECDHE-PSK-CHACHA20-POLY1305",
        "ECDHE-PSK",
        "CHACHA20-POLY1305",
        "AEAD",
    ),
    suite(
        "DHE-PSK-AES256-GCM-SHA384",
        "DHE-PSK",
        "AES-256-GCM",
        "AEAD",
    ),
    suite(
        "DHE-PSK-CHACHA20-POLY1305",
        "DHE-PSK",
        "CHACHA20-POLY1305",
        "AEAD",
    ),
    suite(
        "DHE-PSK-AES128-GCM-SHA256",
        "DHE-PSK",
        "AES-128-GCM",
        "AEAD",
    ),
    suite(
        "ECDHE-PSK-AES256-CBC-SHA384",
        "ECDHE-PSK",
        "AES-256-CBC",
        "SHA384",
    ),
    suite(
        "ECDHE-PSK-AES128-CBC-SHA256",
        "ECDHE-PSK",
        "AES-128-CBC",
        "SHA256",
    ),
    suite(
        "ECDHE-PSK-AES256-CBC-SHA",
        "ECDHE-PSK",
        "AES-256-CBC",
        "SHA1",
    ),
    suite(
        "ECDHE-PSK-AES128-CBC-SHA",
        "ECDHE-PSK",
        "AES-128-CBC",
        "SHA1",
    ),
    suite(
        "DHE-PSK-AES256-CBC-SHA384",
        "DHE-PSK",
        "AES-256-CBC",
        "SHA384",
    ),
    suite(
        "DHE-PSK-AES128-CBC-SHA256",
        "DHE-PSK",
        "AES-128-CBC",
        "SHA256",
    ),
    suite("PSK-AES256-GCM-SHA384", "PSK", "AES-256-GCM", "AEAD"),
    suite("PSK-CHACHA20-POLY1305", "PSK", "CHACHA20-POLY1305", "AEAD"),
    suite("PSK-AES128-GCM-SHA256", "PSK", "AES-128-GCM", "AEAD"),
    suite("PSK-AES256-CBC-SHA384", "PSK", "AES-256-CBC", "SHA384"),
    suite("PSK-AES128-CBC-SHA256", "PSK", "AES-128-CBC", "SHA256"),
    suite("PSK-AES256-CBC-SHA", "PSK", "AES-256-CBC", "SHA1"),
    suite("PSK-AES128-CBC-SHA", "PSK", "AES-128-CBC", "SHA1"),
    suite("ADH-AES256-GCM-SHA384", "ANON-DH", "AES-256-GCM", "AEAD"),
    suite("ADH-AES128-GCM-SHA256", "ANON-DH", "AES-128-GCM", "AEAD"),
    suite("ADH-AES256-SHA256", "ANON-DH", "AES-256-CBC", "SHA256"),
    suite("ADH-AES128-SHA256", "ANON-DH", "AES-128-CBC", "SHA256"),
    suite("AECDH-AES256-SHA", "ANON-ECDH", "AES-256-CBC", "SHA1"),
    suite("AECDH-AES128-SHA", "ANON-ECDH", "AES-128-CBC", "SHA1"),
    suite("ADH-AES256-SHA", "ANON-DH", "AES-256-CBC", "SHA1"),
    suite("ADH-AES128-SHA", "ANON-DH", "AES-128-CBC", "SHA1"),
];

/// The suites of TLS 1.3, the preferred ones first: OpenSSL's name, and what encrypts in GnuTLS's
/// words.
pub const SUITES_1_3: &[(&str, &str)] = &[
    ("TLS_AES_256_GCM_SHA384", "AES-256-GCM"),
    ("TLS_CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    ("TLS_AES_128_GCM_SHA256", "AES-128-GCM"),
    ("TLS_AES_128_CCM_SHA256", "AES-128-CCM"),
];

/// What encrypts, and the strength of its key in bits.
pub const CIPHERS: &[(&str, u32)] = &[
    ("AES-256-GCM", 256),
    ("CHACHA20-POLY1305", 256),
    ("AES-256-CCM", 256),
    ("AES-256-CBC", 256),
    ("AES-128-GCM", 128),
    ("AES-128-CCM", 128),
    ("AES-128-CBC", 128),
];

/// How keys are agreed on where the server has a certificate; those that keep what was said secret
/// even from who learns its key later come first.
pub const EXCHANGES: &[&str] = &["ECDHE-ECDSA", "ECDHE-RSA", "DHE-RSA", "RSA"];

/// How keys are agreed on otherwise.
pub const OTHER_EXCHANGES: &[&str] = &["ECDHE-PSK", "DHE-PSK", "PSK", "ANON-ECDH", "ANON-DH"];

/// What authenticates.
pub const MACS: &[&str] = &["AEAD", "SHA384", "SHA256", "SHA1"];

/// The groups in which keys are agreed on: GnuTLS's name, OpenSSL's, the strength in bits.
pub const GROUPS: &[(&str, &str, u32)] = &[
    ("X25519", "X25519", 128),
    ("SECP256R1", "P-256", 128),
    ("X448", "X448", 224),
    ("SECP384R1", "P-384", 192),
    ("SECP521R1", "P-521", 256),
];
