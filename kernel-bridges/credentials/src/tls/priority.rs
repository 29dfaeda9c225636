//! What of TLS may be used, in the notation of GnuTLS's priority strings, made known to OpenSSL.
//!
//! A string is a keyword, then changes: `NORMAL:-VERS-TLS1.3:+PSK`. Whatever a string says has an
//! effect or is the case anyhow; what OpenSSL cannot be told is refused. The order of preference is
//! ours. TLS before 1.2 is not spoken, so taking it away is no change and adding it is refused.

use openssl::error::ErrorStack;
use openssl::ssl::{SslContextBuilder, SslOptions, SslVersion};
use stord_qmp::Error;

use super::suites::{CIPHERS, EXCHANGES, GROUPS, MACS, OTHER_EXCHANGES, SUITES, SUITES_1_3};

const VERSIONS: &[&str] = &["TLS1.3", "TLS1.2"];
const OLD_VERSIONS: &[&str] = &[
    "SSL3.0", "TLS1.0", "TLS1.1", "DTLS0.9", "DTLS1.0", "DTLS1.2",
];

/// What may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priority {
    versions: Vec<&'static str>,
    ciphers: Vec<&'static str>,
    exchanges: Vec<&'static str>,
    macs: Vec<&'static str>,
    groups: Vec<&'static str>,
    /// OpenSSL's security level, unless the machine's is to be used.
    level: Option<u32>,
    is_server_preferred: bool,
}

impl Priority {
    /// Reads a priority string; an empty one is `NORMAL`.
    ///
    /// # Errors
    /// A part is unknown, or OpenSSL knows nothing of the kind.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let refused = |part: &str| {
            Error::generic(format!(
                "Unable to set TLS session priority {text}: '{part}' is unknown or not supported"
            ))
        };
        let mut parts = text.split(':');
        let first = match parts.next() {
            None | Some("") if text.is_empty() => "NORMAL",
            first => first.unwrap_or_default(),
        };
        let mut priority = Self::keyword(first).ok_or_else(|| refused(first))?;
        for part in parts {
            priority.change(part).ok_or_else(|| refused(part))?;
        }
        Ok(priority)
    }

    fn keyword(name: &str) -> Option<Self> {
        let strength = match name {
            "NONE" => u32::MAX,
            "SECURE192" | "SECURE256" | "SUITEB192" => 192,
            "SECURE128" | "SUITEB128" => 128,
            "NORMAL" | "PERFORMANCE" | "PFS" | "LEGACY" => 0,
            // The machine's own policy. OpenSSL is told of its limits by its own configuration.
            _ if name.starts_with('@') && name.split([',', '@']).any(|name| name == "SYSTEM") => 0,
            _ => return None,
        };
        let is_none = name == "NONE";
        let level = match name {
            "SECURE128" | "SUITEB128" => Some(3),
            "SECURE192" | "SECURE256" | "SUITEB192" => Some(4),
            _ => None,
        };
        let everything = Self {
            versions: if is_none { vec![] } else { VERSIONS.to_vec() },
            ciphers: CIPHERS
                .iter()
                .filter(|(_, bits)| *bits >= strength)
                .map(|(name, _)| *name)
                .collect(),
            exchanges: match is_none {
                true => Vec::new(),
                false => EXCHANGES.to_vec(),
            },
            macs: if is_none { vec![] } else { MACS.to_vec() },
            groups: GROUPS
                .iter()
                .filter(|(_, _, bits)| *bits >= strength)
                .map(|(_, name, _)| *name)
                .collect(),
            level,
            is_server_preferred: false,
        };
        Some(match name {
            "PFS" | "SECURE128" | "SECURE192" | "SECURE256" => {
                everything.without_exchange(|exchange| exchange == "RSA" && name == "PFS")
            }
            "SUITEB128" | "SUITEB192" => Self {
                ciphers: (everything.ciphers.iter().copied())
                    .filter(|cipher| cipher.ends_with("-GCM"))
                    .collect(),
                exchanges: vec!["ECDHE-ECDSA"],
                macs: vec!["AEAD"],
                groups: (everything.groups.iter().copied())
                    .filter(|group| matches!(*group, "P-256" | "P-384"))
                    .collect(),
                ..everything
            },
            _ => everything,
        })
    }

    fn without_exchange(mut self, is_unwanted: impl Fn(&str) -> bool) -> Self {
        self.exchanges.retain(|exchange| !is_unwanted(exchange));
        self
    }

    /// Applies a change; none if it cannot be.
    fn change(&mut self, part: &str) -> Option<()> {
        if let Some(option) = part.strip_prefix('%') {
            return self.option(option);
        }
        let adds = part.starts_with('+');
        let name = part.strip_prefix(['+', '-', '!'])?;
        let known = |names: &[&'static str], name: &str| -> Option<&'static str> {
            names.iter().copied().find(|known| *known == name)
        };
        let ciphers: Vec<_> = CIPHERS.iter().map(|(name, _)| *name).collect();
        if let Some(version) = name.strip_prefix("VERS-") {
            return match version {
                "ALL" | "TLS-ALL" => toggle(&mut self.versions, VERSIONS, adds),
                old if OLD_VERSIONS.contains(&old) => (!adds).then_some(()),
                "DTLS-ALL" => (!adds).then_some(()),
                _ => toggle(&mut self.versions, &[known(VERSIONS, version)?], adds),
            };
        }
        if let Some(group) = name.strip_prefix("GROUP-").or(name.strip_prefix("CURVE-")) {
            let groups = GROUPS
                .iter()
                .filter(|(name, ..)| group == "ALL" || group == *name);
            let groups: Vec<_> = groups.map(|(_, name, _)| *name).collect();
            // Groups of plain Diffie-Hellman are not offered to start with.
            return match groups.is_empty() {
                true => (!adds && group.starts_with("FFDHE")).then_some(()),
                false => toggle(&mut self.groups, &groups, adds),
            };
        }
        match name {
            "CIPHER-ALL" => return toggle(&mut self.ciphers, &ciphers, adds),
            "MAC-ALL" => return toggle(&mut self.macs, MACS, adds),
            "KX-ALL" => {
                let all = [EXCHANGES, OTHER_EXCHANGES].concat();
                return toggle(&mut self.exchanges, &all, adds);
            }
            // They are the only ones there are.
            "COMP-NULL" | "COMP-ALL" | "CTYPE-X509" | "CTYPE-X.509" | "CTYPE-ALL" | "SIGN-ALL" => {
                return adds.then_some(());
            }
            // They are not there to start with.
            "ARCFOUR-128" | "3DES-CBC" | "MD5" | "CTYPE-OPENPGP" | "COMP-DEFLATE" => {
                return (!adds).then_some(());
            }
            _ => {}
        }
        if let Some(cipher) = known(&ciphers, name) {
            return toggle(&mut self.ciphers, &[cipher], adds);
        }
        if let Some(mac) = known(MACS, name) {
            return toggle(&mut self.macs, &[mac], adds);
        }
        let exchange = known(EXCHANGES, name).or_else(|| known(OTHER_EXCHANGES, name))?;
        toggle(&mut self.exchanges, &[exchange], adds)
    }

    fn option(&mut self, option: &str) -> Option<()> {
        match option {
            "SERVER_PRECEDENCE" => self.is_server_preferred = true,
            "PROFILE_LOW" => self.level = Some(1),
            "PROFILE_MEDIUM" => self.level = Some(2),
            "PROFILE_HIGH" => self.level = Some(3),
            "PROFILE_ULTRA" => self.level = Some(4),
            "PROFILE_FUTURE" => self.level = Some(5),
            // It is the case anyhow.
            "NO_TICKETS" | "SAFE_RENEGOTIATION" => {}
            _ => return None,
        }
        Some(())
    }

    /// The same with other ways to agree on keys, and no others.
    pub fn with_exchanges(mut self, exchanges: &[&'static str]) -> Self {
        self.exchanges = exchanges.to_vec();
        self
    }

    /// The same without TLS 1.3, which has no anonymous servers.
    pub fn without_tls_1_3(mut self) -> Self {
        self.versions.retain(|version| *version != "TLS1.3");
        self
    }

    /// The same at a lower level of security than OpenSSL's default.
    pub fn with_level(mut self, level: u32) -> Self {
        self.level = Some(level);
        self
    }

    /// Tells OpenSSL.
    ///
    /// # Errors
    /// Nothing is left that could be used.
    pub fn apply(&self, context: &mut SslContextBuilder) -> Result<(), Error> {
        let nothing_left = || {
            Error::generic("Unable to set TLS session priority: it leaves nothing that can be used")
        };
        let version = |name| match name {
            "TLS1.3" => SslVersion::TLS1_3,
            _ => SslVersion::TLS1_2,
        };
        let newest = self.versions.iter().max().ok_or_else(nothing_left)?;
        let oldest = self.versions.iter().min().ok_or_else(nothing_left)?;
        let is_usable = |name: &str| match name {
            "TLS1.3" => !self.suites_1_3().is_empty(),
            _ => !self.suites_1_2().is_empty(),
        };
        if !self.versions.iter().any(|version| is_usable(version)) {
            return Err(nothing_left());
        }
        let told = || -> Result<(), ErrorStack> {
            if let Some(level) = self.level {
                context.set_security_level(level);
            }
            context.set_min_proto_version(Some(version(oldest)))?;
            context.set_max_proto_version(Some(version(newest)))?;
            context.set_ciphersuites(&self.suites_1_3())?;
            let suites = self.suites_1_2();
            if !suites.is_empty() {
                context.set_cipher_list(&suites)?;
            }
            if !self.groups.is_empty() {
                context.set_groups_list(&self.groups.join(":"))?;
            }
            // A client may prefer what costs three times as much here.
            if self.is_server_preferred || has_fast_aes() {
                context.set_options(SslOptions::CIPHER_SERVER_PREFERENCE);
            }
            Ok(())
        };
        let mut told = told;
        told().map_err(|error| {
            Error::generic(format!("Unable to set TLS session priority: {error}"))
                .with_source(error)
        })
    }

    fn suites_1_2(&self) -> String {
        if !self.versions.contains(&"TLS1.2") {
            return String::new();
        }
        let allowed = SUITES.iter().filter(|suite| {
            self.exchanges.contains(&suite.exchange)
                && self.ciphers.contains(&suite.cipher)
                && self.macs.contains(&suite.mac)
        });
        let names: Vec<_> = allowed.map(|suite| suite.name).collect();
        names.join(":")
    }

    fn suites_1_3(&self) -> String {
        if !self.versions.contains(&"TLS1.3") || !self.macs.contains(&"AEAD") {
            return String::new();
        }
        let allowed = SUITES_1_3
            .iter()
            .filter(|(_, cipher)| self.ciphers.contains(cipher));
        let mut names: Vec<_> = allowed.map(|(name, _)| *name).collect();
        if has_fast_aes() {
            // Keys of a file go with SHA-256 only, so the second of them counts.
            names.sort_by_key(|name| {
                !name.ends_with("_GCM_SHA384") && !name.ends_with("_GCM_SHA256")
            });
        }
        names.join(":")
    }
}

/// Whether the processor has instructions for AES.
fn has_fast_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Adds names to a set or takes them out of it.
fn toggle(set: &mut Vec<&'static str>, names: &[&'static str], adds: bool) -> Option<()> {
    set.retain(|name| !names.contains(name));
    if adds {
        set.extend_from_slice(names);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use openssl::ssl::{SslContext, SslMethod};

    use super::*;

    fn parse(text: &str) -> Priority {
        Priority::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn common_strings_are_understood() {
        let normal = parse("NORMAL");
        assert_eq!(parse(""), normal);
        assert_eq!(parse("@SYSTEM"), normal);
        assert_eq!(parse("@QEMU,SYSTEM"), normal);
        assert_eq!(parse("NORMAL:-VERS-TLS1.0:+COMP-NULL:%NO_TICKETS"), normal);
        let old = parse("NORMAL:-VERS-TLS1.3");
        assert!(old.suites_1_3().is_empty());
        assert!(
            old.suites_1_2()
                .starts_with("ECDHE-ECDSA-AES256-GCM-SHA384:")
        );
        let new = parse("NORMAL:-VERS-ALL:+VERS-TLS1.3");
        assert!(new.suites_1_2().is_empty() && !new.suites_1_3().is_empty());
        let strong = parse("SECURE256");
        assert!(!strong.suites_1_2().contains("AES128"));
        assert_eq!(strong.level, Some(4));
        assert!(!parse("PFS").suites_1_2().contains(":AES256-SHA"));
        let chosen = "NONE:+VERS-TLS1.2:+AES-128-GCM:+ECDHE-RSA:+AEAD:+SIGN-ALL:+GROUP-X25519";
        assert_eq!(parse(chosen).suites_1_2(), "ECDHE-RSA-AES128-GCM-SHA256");
        assert_eq!(parse(chosen).groups, ["X25519"]);
    }

    #[test]
    fn what_openssl_cannot_be_told_is_refused() {
        for (text, part) in [
            ("NOPE", "NOPE"),
            ("@NOPE", "@NOPE"),
            ("NORMAL:", ""),
            ("NORMAL:VERS-TLS1.2", "VERS-TLS1.2"),
            ("NORMAL:+VERS-TLS1.1", "+VERS-TLS1.1"),
            ("NORMAL:+VERS-TLS2.0", "+VERS-TLS2.0"),
            ("NORMAL:-SIGN-ALL", "-SIGN-ALL"),
            ("NORMAL:+3DES-CBC", "+3DES-CBC"),
            ("NORMAL:%COMPAT", "%COMPAT"),
            (":NORMAL", ""),
        ] {
            let error = Priority::parse(text).expect_err(text);
            let expected = format!(
                "Unable to set TLS session priority {text}: '{part}' is unknown or not supported"
            );
            assert_eq!(error.message, expected);
        }
    }

    #[test]
    fn openssl_knows_every_name() {
        let level_0 = parse("NORMAL:+KX-ALL").with_level(0);
        let mut context = SslContext::builder(SslMethod::tls()).expect("memory");
        level_0.apply(&mut context).expect("names are known");
        let context = context.build();
        let ssl = openssl::ssl::Ssl::new(&context).expect("memory");
        drop(ssl);
        let mut context = SslContext::builder(SslMethod::tls()).expect("memory");
        let error = parse("NONE:+VERS-TLS1.2").apply(&mut context);
        assert!(error.is_err_and(|error| error.message.ends_with("nothing that can be used")));
        for suite in SUITES {
            let mut context = SslContext::builder(SslMethod::tls()).expect("memory");
            context.set_security_level(0);
            context.set_cipher_list(suite.name).expect(suite.name);
        }
    }
}
